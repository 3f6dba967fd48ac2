"""The transformer of every family: embed, layers of attention and MLP, final norm, and the logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.models import mla
from engine.models.config import LatentSpec, LayerSpec, ModelConfig, RopeSpec
from engine.models.layers import finite, gated_mlp, project, rms_norm, soft_cap
from engine.models.moe import mixture
from engine.models.params import Params
from engine.models.rope import apply_rope, rope_tables
from kernels.attention import AttentionSpec, Backend, HeadInputs, RaggedBatch
from kernels.product import rows_product, take_rows

Rope = tuple[Array, Array] | None  # cosines and sines of each token's position


def attention_spec(config: ModelConfig, index: int) -> AttentionSpec:
    """-> what layer `index` asks of the attention backend."""
    layer, scale = config.layers[index], config.attention_scale or config.head_dim**-0.5
    return AttentionSpec(
        config.num_kv_heads, config.group, config.head_dim, scale,
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
) -> tuple[Array, list[Any]]:
    """tokens [T] i32, positions [T] i32, one ragged batch -> hidden states [T, D] after the final norm, new caches."""
    return forward_with_taps(config, backend, params, kv_caches, tokens, positions, batch, ())[:2]


def forward_with_taps(
    config: ModelConfig,
    backend: Backend,
    params: Params,
    kv_caches: list[Any],
    tokens: Array,
    positions: Array,
    batch: RaggedBatch,
    taps: Sequence[int],
) -> tuple[Array, list[Any], list[Array]]:
    """As `forward`, and the hidden states [T, D] that go into layers `taps`; len(config.layers): out of the last."""
    x, states = embed(config, params, tokens), []
    ropes: dict[RopeSpec | None, Rope] = {None: None}
    with jax.named_scope("rope"):
        for layer in config.layers:
            if layer.rope is not None and layer.rope not in ropes:
                ropes[layer.rope] = rope_tables(layer.rope, positions, config.max_model_len)
    caches = []
    for i, (layer, weights) in enumerate(zip(config.layers, params["layers"], strict=True)):
        spec = attention_spec(config, i)
        states.append(x)
        x, cache = decoder_layer(config, layer, backend, spec, weights, kv_caches[i], x, ropes[layer.rope], batch)
        caches.append(cache)
    states.append(x)
    with jax.named_scope("final_norm"):
        hidden = rms_norm(x, params["final_norm"], config.norm_eps)
    return hidden, caches, [states[i] for i in taps]


def embed(config: ModelConfig, params: Params, tokens: Array) -> Array:
    """tokens [T] i32 -> [T, D]."""
    with jax.named_scope("embed"):
        x = take_rows(params["embed"], tokens)
        return x * jnp.asarray(config.embedding_scale, x.dtype) if config.embedding_scale != 1 else x


def rope_of(config: ModelConfig, layer: LayerSpec, positions: Array) -> Rope:
    """-> cosines and sines for one layer at positions [T] i32."""
    return None if layer.rope is None else rope_tables(layer.rope, positions, config.max_model_len)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))  # traced and lowered once for all layers that are alike; XLA inlines it
def decoder_layer(
    config: ModelConfig,
    layer: LayerSpec,
    backend: Backend,
    spec: AttentionSpec,
    p: Params,
    kv_cache: Any,
    x: Array,
    rope: Rope,
    batch: RaggedBatch,
) -> tuple[Array, Any]:
    def norm(name: str, h: Array) -> Array:
        return rms_norm(h, p[name], config.norm_eps) if name in p else h

    with jax.named_scope("attention"):
        attend = _attention if layer.latent is None else partial(_latent_attention, layer.latent)
        h, kv_cache = attend(config, backend, spec, p, kv_cache, norm("attn_norm", x), rope, batch)
        x = x + norm("attn_post_norm", h)
    with jax.named_scope("mlp"):
        return x + norm("mlp_post_norm", _mlp(config, layer, p, norm("mlp_norm", x), batch)), kv_cache


def gated_layer(
    config: ModelConfig,
    layer: LayerSpec,
    backend: Backend,
    spec: AttentionSpec,
    p: Params,
    kv_cache: Any,
    x: Array,
    residual: Array,
    rope: Rope,
    batch: RaggedBatch,
) -> tuple[Array, Any]:
    """A layer whose attention reads something else than its residual: x [T, E], normed, and [T, D] -> [T, D], cache."""
    h, kv_cache = _attention(config, backend, spec, p, kv_cache, x, rope, batch)
    residual = residual + h
    return residual + _mlp(config, layer, p, rms_norm(residual, p["mlp_norm"], config.norm_eps), batch), kv_cache


def _attention(
    config: ModelConfig,
    backend: Backend,
    spec: AttentionSpec,
    p: Params,
    kv_cache: Any,
    x: Array,
    rope: Rope,
    batch: RaggedBatch,
) -> tuple[Array, Any]:
    """Grouped-query attention (Ainslie et al. 2023). x [T, D] -> [T, D], new cache."""
    options = {"sinks": p.get("sinks"), "kv_scales": p.get("kv_scales")}
    if backend.attend_product is not None and config.qk_norm != "width":
        inputs = HeadInputs(
            project(x, p["qkv"]), p.get("qkv_bias"), p.get("q_norm"), p.get("k_norm"), rope, config.norm_eps
        )
        with jax.named_scope("attend"):
            out, kv_cache = backend.attend_product(inputs, kv_cache, batch, spec, **options)
    else:
        qkv = project(x, p["qkv"], p.get("qkv_bias"))
        q, k, v = qkv[:, :, : config.group], qkv[:, :, config.group], qkv[:, :, config.group + 1]
        if config.qk_norm:
            q, k = rms_norm(q, p["q_norm"], config.norm_eps), rms_norm(k, p["k_norm"], config.norm_eps)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        with jax.named_scope("attend"):
            out, kv_cache = backend.update_and_attend(q, k, finite(v), kv_cache, batch, spec, **options)
    return project(out, p["out"], p.get("out_bias")), kv_cache


def _latent_attention(
    latent: LatentSpec,
    config: ModelConfig,
    backend: Backend,
    spec: AttentionSpec,
    p: Params,
    kv_cache: Any,
    x: Array,
    rope: Rope,
    batch: RaggedBatch,
) -> tuple[Array, Any]:
    """Multi-head latent attention. x [T, D] -> [T, D], new cache."""
    assert rope is not None
    q, k = mla.queries_and_key(x, p, latent, config.norm_eps, rope)
    with jax.named_scope("attend"):
        out, kv_cache = backend.update_and_attend(q, finite(k), None, kv_cache, batch, spec)
    return mla.heads_output(out, p), kv_cache


def _mlp(config: ModelConfig, layer: LayerSpec, p: Params, x: Array, batch: RaggedBatch) -> Array:
    """x [T, D] -> [T, D]."""
    if layer.moe is not None:
        valid = jnp.arange(x.shape[0]) < batch.cu_q_lens[-1]
        return mixture(x, p, layer.moe, config.activation, valid)
    return gated_mlp(x, p["gate_up"], p["down"], config.activation, p.get("gate_up_bias"), p.get("down_bias"))


def logits(config: ModelConfig, params: Params, hidden: Array) -> Array:
    """hidden [R, D] -> logits [R, V] float32."""
    with jax.named_scope("logits"):
        y = rows_product(hidden, params.get("lm_head", params["embed"]))
        return y if config.logit_soft_cap is None else soft_cap(y, config.logit_soft_cap)
