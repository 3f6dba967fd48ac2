"""The transformer of every family: embed, layers of attention and MLP, final norm, and the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.models import mla
from engine.models.config import LatentSpec, LayerSpec, ModelConfig, RopeSpec
from engine.models.layers import finite, gated_mlp, project, rms_norm, rms_norm_over, soft_cap
from engine.models.moe import mixture
from engine.models.params import Params
from engine.models.pipeline import cut, cut_tokens, nothing
from engine.models.placement import stage_layers
from engine.models.rope import apply_rope, rope_tables
from kernels.attention import AttentionSpec, Backend, HeadInputs, RaggedBatch
from kernels.product import rows_product, take_rows
from kernels.quantized import QuantizedTensor
from sharding.axes import ALONE, Axes
from sharding.heads import split_heads
from sharding.pipeline import rotate

Rope = tuple[Array, Array] | None  # cosines and sines of each token's position
Ropes = dict[RopeSpec, tuple[Array, Array]]


def attention_spec(config: ModelConfig, index: int, devices: int = 1) -> AttentionSpec:
    """-> what layer `index` asks of the attention backend of each of the `devices` that share it."""
    layer, scale = config.layers[index], config.attention_scale or config.head_dim**-0.5
    if layer.latent is not None:  # every device has all of the one KV head
        heads, group = config.num_kv_heads, -(-config.group // devices)
    else:
        split = split_heads(config.num_kv_heads, config.group, devices)
        heads, group = split.all_kv_heads // devices, split.own_group
    return AttentionSpec(
        heads, group, config.head_dim, scale,
        window=layer.window, soft_cap=config.attention_soft_cap, value_dim=layer.latent and layer.latent.kv_rank,
    )  # fmt: skip


def forward(
    config: ModelConfig,
    backend: Backend,
    params: Params,
    kv_caches: list[Any],
    tokens: Array,
    positions: Array,
    batch: RaggedBatch,
    axes: Axes = ALONE,
) -> tuple[Array, list[Any]]:
    """tokens [T] i32, positions [T] i32, one ragged batch -> hidden states [T, D] after the final norm, new caches."""
    return forward_with_taps(config, backend, params, kv_caches, tokens, positions, batch, (), axes)[:2]


def forward_with_taps(
    config: ModelConfig,
    backend: Backend,
    params: Params,
    kv_caches: list[Any],
    tokens: Array,
    positions: Array,
    batch: RaggedBatch,
    taps: Sequence[int],
    axes: Axes = ALONE,
) -> tuple[Array, list[Any], list[Array]]:
    """As `forward`, and the hidden states [T, D] that go into layers `taps`; len(config.layers): out of the last.
    Those are on every device.

    On a mesh this is what each device computes of its own part, inside `jax.shard_map`; the hidden states are right on
    the last stage alone. A stage has a cache for each place of its layers (`placement.stage_layers`).
    """
    with jax.named_scope("embed"):
        x = embed(params["embed"], tokens, axes)
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
    specs = dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None)
    with jax.named_scope("rope"):
        ropes: Ropes = {spec: rope_tables(spec, positions, config.max_model_len) for spec in specs}
    run = partial(_stage, config, backend, params["layers"], params["final_norm"], axes)
    count = axes.micro_batches
    if count > 1 or axes.stage.size > 1:
        parts, size = cut(batch, count)
        per_token = jax.tree.map(lambda a: cut_tokens(a, count, size), (x, ropes))
    uncut = lambda x: x[:, : tokens.shape[0] // count].reshape(-1, x.shape[-1])
    if axes.stage.size == 1:
        part = lambda m: jax.tree.map(lambda a: a[m], (*per_token, parts)) if count > 1 else (x, ropes, batch)
        xs, own_ropes, own_batches = zip(*map(part, range(count)), strict=True)
        whole = lambda xs: uncut(jnp.stack(xs)) if count > 1 else xs[0]
        normed, caches, states = run(xs, kv_caches, own_ropes, own_batches)
        hidden, tapped = whole(normed), [whole(states[tap]) for tap in taps]
    else:
        places = [_place_of(config, tap, axes.stage.size) for tap in taps]

        def one(x: Array, m: Array, is_real: Array, carry: tuple[list[Any], list[Array]]) -> tuple[Array, Any]:
            caches, tapped = carry
            own_ropes, own_batch = jax.tree.map(lambda a: a[m], (per_token[1], parts))
            _, caches, states = run([x], caches, [own_ropes], [nothing(own_batch, is_real)])
            at = jnp.where(is_real, m, count)
            own = [t.at[at].set(states[place][0], mode="drop") for t, (_, place) in zip(tapped, places, strict=True)]
            return states[-1][0], (caches, own)

        x, (caches, tapped) = rotate(
            one, per_token[0], (kv_caches, [jnp.zeros_like(per_token[0])] * len(taps)), axes.stage
        )
        x = uncut(x)
        tapped = [axes.stage.only(uncut(t), stage) for t, (stage, _) in zip(tapped, places, strict=True)]
        with jax.named_scope("final_norm"):
            hidden = rms_norm(x, params["final_norm"], config.norm_eps)
    return hidden, caches, tapped


def _place_of(config: ModelConfig, tap: int, stages: int) -> tuple[int, int]:
    """-> the stage, and the place in it, that a layer is at; for what is behind the last, the end of the last stage."""
    places = stage_layers(config.layers, stages)
    if tap == len(config.layers):
        return stages - 1, len(places)
    return next((place.index(tap), i) for i, place in enumerate(places) if tap in place)


def _stage(
    config: ModelConfig, backend: Backend, layers: list[Params], final_norm: Array, axes: Axes,
    xs: Sequence[Array], kv_caches: list[Any], ropes: Sequence[Ropes], batches: Sequence[RaggedBatch],
) -> tuple[Sequence[Array], list[Any], list[Sequence[Array]]]:  # fmt: skip
    """All layers of this device's stage, of which `layers` are the parameters. xs: each micro-batch's [T, D] -> what
    comes out of the last layer, after the final norm; new caches; what went into each layer and came out of the last.

    Layer after layer takes one micro-batch after the other: while the devices add up one, they compute the next.
    """
    stages, caches, states = axes.stage.size, [], [xs]
    if stages > 1:
        layers = jax.tree.map(lambda a: a[0], layers)
    norms = [*(p.get("attn_norm") for p in layers), final_norm]
    normed = [_norm(config, x, norms[0]) for x in xs]
    for place, p, norm, cache in zip(stage_layers(config.layers, stages), layers, norms[1:], kv_caches, strict=True):
        present = [i for i in place if i is not None]
        kinds = {config.layers[i]: attention_spec(config, i, axes.model.size) for i in present}
        order = list(kinds)
        which = None
        if len(kinds) > 1:  # a place without a layer has weights of zero, and so may be of any kind
            of_stage = [order.index(config.layers[i]) if i is not None else 0 for i in place]
            which = jnp.array(of_stage, jnp.int32)[axes.stage.index()]
        following = []
        for *both, rope, batch in zip(xs, normed, ropes, batches, strict=True):
            own = tuple(rope[kind.rope] if kind.rope is not None else None for kind in order)
            both, cache = decoder_layer(
                config, tuple(kinds.items()), backend, axes, p, norm, cache, both, own, batch, which
            )
            following.append(both)
        xs, normed = zip(*following, strict=True)
        caches.append(cache)
        states.append(xs)
    return normed, caches, states


@partial(jax.jit, static_argnums=(0, 1, 2))  # traced and lowered once for all layers that are alike; XLA inlines it
def decoder_layer(
    config: ModelConfig,
    kinds: tuple[tuple[LayerSpec, AttentionSpec], ...],
    backend: Backend,
    axes: Axes,
    p: Params,
    following: Array | None,
    kv_cache: Any,
    both: Sequence[Array],
    ropes: tuple[Rope, ...],
    batch: RaggedBatch,
    which: Array | None,
) -> tuple[tuple[Array, Array], Any]:
    """One layer of one of several kinds, `which` says of which: stages may differ where they compute side by side.

    both: the residual [T, D] and the same as this layer's attention reads it -> as what follows does, after its norm
    (`following`, its weight [D], if it has one), and the new cache.

    Each device has a part of the heads, widths or experts, and the sums over all of them are the only collectives.
    """

    norm = partial(_norm, config)

    def of_kind(parts: list[Callable[..., Any]], *operands: Any) -> Any:
        return parts[0](*operands) if which is None else jax.lax.switch(which, parts, *operands)

    def complete(h: Array, bias: str) -> Array:
        h = axes.model.sum(h)
        return h + p[bias][None] if bias in p else h

    def add(x: Array, h: Array, bias: str, post: str, weight: Array | None) -> tuple[Array, Array]:
        """-> the residual x with a block's output h, and its norm; in one kernel, where devices have a link for it."""
        link = axes.model.link
        if link is not None and weight is not None and not {bias, post} & p.keys() and link.supports_norm(h):
            return link.sum_and_norm(h, x, weight, config.norm_eps)
        x = x + norm(complete(h, bias), p.get(post))
        return x, norm(x, weight)

    x, normed = both
    with jax.named_scope("attention"):
        parts = [
            partial(
                _attention if layer.latent is None else partial(_latent_attention, layer.latent),
                config,
                backend,
                spec,
                axes,
                p,
                rope=rope,
            )
            for (layer, spec), rope in zip(kinds, ropes, strict=True)
        ]
        h, kv_cache = of_kind(parts, kv_cache, normed, batch)
        x, normed = add(x, h, "out_bias", "attn_post_norm", p.get("mlp_norm"))
    with jax.named_scope("mlp"):
        parts = [partial(_mlp, config, layer, axes, p) for layer, _ in kinds]
        h = of_kind(parts, normed, batch)
        return add(x, h, "down_bias", "mlp_post_norm", following), kv_cache


def _norm(config: ModelConfig, x: Array, weight: Array | None) -> Array:
    """-> x [T, D] after a norm, if there is one."""
    return x if weight is None else rms_norm(x, weight, config.norm_eps)


def gated_layer(
    config: ModelConfig,
    layer: LayerSpec,
    backend: Backend,
    spec: AttentionSpec,
    p: Params,
    kv_cache: Any,
    x: Array,
    residual: Array,
    batch: RaggedBatch,
    rope: Rope,
) -> tuple[Array, Any]:
    """A layer whose attention reads something else than its residual: x [T, E], normed, and [T, D] -> [T, D], cache."""
    h, kv_cache = _attention(config, backend, spec, ALONE, p, kv_cache, x, batch, rope)
    residual = residual + h
    return residual + _mlp(config, layer, ALONE, p, rms_norm(residual, p["mlp_norm"], config.norm_eps), batch), kv_cache


def _attention(
    config: ModelConfig,
    backend: Backend,
    spec: AttentionSpec,
    axes: Axes,
    p: Params,
    kv_cache: Any,
    x: Array,
    batch: RaggedBatch,
    rope: Rope,
) -> tuple[Array, Any]:
    """Grouped-query attention (Ainslie et al. 2023). x [T, D] -> this device's heads' part of [T, D], new cache."""
    options = {"sinks": p.get("sinks"), "kv_scales": p.get("kv_scales")}
    if backend.attend_product is not None and config.qk_norm != "width":
        inputs = HeadInputs(
            project(x, p["qkv"]), p.get("qkv_bias"), p.get("q_norm"), p.get("k_norm"), rope, config.norm_eps
        )
        with jax.named_scope("attend"):
            out, kv_cache = backend.attend_product(inputs, kv_cache, batch, spec, **options)
    else:
        qkv = project(x, p["qkv"], p.get("qkv_bias"))
        q, k, v = qkv[:, :, : spec.group], qkv[:, :, spec.group], qkv[:, :, spec.group + 1]
        if config.qk_norm == "head":
            q, k = rms_norm(q, p["q_norm"], config.norm_eps), rms_norm(k, p["k_norm"], config.norm_eps)
        if config.qk_norm == "width":
            copies = split_heads(config.num_kv_heads, config.group, axes.model.size).copies
            q = rms_norm_over(q, p["q_norm"], config.norm_eps, config.num_heads * config.head_dim, axes.model)
            k = rms_norm_over(
                k, p["k_norm"], config.norm_eps, config.num_kv_heads * copies * config.head_dim, axes.model
            )
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        with jax.named_scope("attend"):
            out, kv_cache = backend.update_and_attend(q, k, finite(v), kv_cache, batch, spec, **options)
    out, kv_cache = _in_order(axes, out, kv_cache)
    return project(out, p["out"]), kv_cache


def _latent_attention(
    latent: LatentSpec,
    config: ModelConfig,
    backend: Backend,
    spec: AttentionSpec,
    axes: Axes,
    p: Params,
    kv_cache: Any,
    x: Array,
    batch: RaggedBatch,
    rope: Rope,
) -> tuple[Array, Any]:
    """Multi-head latent attention. x [T, D] -> this device's heads' part of [T, D], new cache."""
    assert rope is not None
    q, k = mla.queries_and_key(x, p, latent, config.norm_eps, rope)
    with jax.named_scope("attend"):
        out, kv_cache = backend.update_and_attend(q, finite(k), None, kv_cache, batch, spec)
    out, kv_cache = _in_order(axes, out, kv_cache)
    return mla.heads_output(out, p), kv_cache


def _in_order(axes: Axes, out: Array, kv_cache: Any) -> tuple[Array, Any]:
    """-> the same, such that the next micro-batch writes to the cache after this one has read it: else it is copied."""
    return jax.lax.optimization_barrier((out, kv_cache)) if axes.is_overlapped else (out, kv_cache)


def _mlp(config: ModelConfig, layer: LayerSpec, axes: Axes, p: Params, x: Array, batch: RaggedBatch) -> Array:
    """x [T, D] -> this device's part of [T, D]."""
    if layer.moe is not None:
        valid = jnp.arange(x.shape[0]) < batch.cu_q_lens[-1]
        return mixture(x, p, layer.moe, config.activation, valid, axes.model)
    return gated_mlp(x, p["gate_up"], p["down"], config.activation, p.get("gate_up_bias"), None)


def embed(table: Array | QuantizedTensor, tokens: Array, axes: Axes = ALONE) -> Array:
    """table [V, D] or this device's rows of it, tokens [T] i32 -> [T, D]."""
    if axes.whole.size == 1:
        return take_rows(table, tokens)
    count = jax.tree.leaves(table)[0].shape[0]
    own = tokens - axes.whole.index() * count
    is_here = (own >= 0) & (own < count)
    x = take_rows(table, jnp.clip(own, 0, count - 1))
    return axes.whole.sum(jnp.where(is_here[:, None], x, jnp.zeros_like(x)))


def logits(config: ModelConfig, params: Params, hidden: Array) -> Array:
    """hidden [R, D] -> logits [R, V] float32; on a mesh, of the part of the vocabulary that this device has."""
    with jax.named_scope("logits"):
        y = rows_product(hidden, params.get("lm_head", params["embed"]))
        return y if config.logit_soft_cap is None else soft_cap(y, config.logit_soft_cap)
