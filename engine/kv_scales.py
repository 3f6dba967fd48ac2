"""What stored keys and values are divided by where the KV cache has 8 bits: the checkpoint's scales, or measured ones.

fp8 without scales in the checkpoint stores numbers as they are: its exponents reach far enough. int8 has none, so that
its scales are measured: one pass over tokens drawn at random gives each head's largest key and value.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from engine.models.config import ModelConfig
from engine.models.params import Params
from engine.models.placement import on_all, stage_layers
from engine.models.transformer import attention_spec, forward
from engine.weights.kv_scales import KVScales
from kernels import xla
from kernels.attention import AttentionSpec, Backend, RaggedBatch
from sharding.axes import ALONE, Axes, axes_of
from sharding.heads import split_heads

LARGEST = 127  # of int8
MARGIN = 1.25  # by which later keys and values may be larger than those that were measured
TOKENS, PAGE = 256, 16


def wanted(model: ModelConfig, kv_dtype: str, stored: KVScales) -> bool:
    """-> whether a model's parameters get scales for a KV cache of `kv_dtype`, of which a checkpoint brings `stored`.

    Errors: ValueError for a model or scales that cannot be stored so.
    """
    if jnp.dtype(kv_dtype).itemsize > 1:
        return False
    latent = any(layer.latent for layer in model.layers)
    if latent and (stored or kv_dtype == "int8"):
        raise ValueError(f"kv_cache_dtype: {kv_dtype} needs scales, which latent attention has none of; take fp8")
    for layer, scales in stored.items():
        if layer >= len(model.layers) or scales.shape[1] not in (1, model.num_kv_heads):
            raise ValueError(f"kv_cache_dtype: layer {layer} has {scales.shape[1]} scales for its KV heads")
    return bool(stored) or kv_dtype == "int8"


def abstract_scales(model: ModelConfig, params: Params, mesh: Mesh | None = None) -> Params:
    """-> shapes of parameters, with each layer's scales; on a mesh, as `with_scales` has them."""
    scales = jax.ShapeDtypeStruct(_of_places(model, mesh), jnp.float32, sharding=_split(mesh))
    return params | {"layers": [layer | {"kv_scales": scales} for layer in params["layers"]]}


def with_scales(
    model: ModelConfig, dtype: str, params: Params, stored: KVScales, seed: int, mesh: Mesh | None = None
) -> Params:
    """-> the parameters with each layer's scales [2, kv_heads] float32: stored ones (1 where a layer lacks them), or
    measured ones.

    On a mesh (stage, model) they are split as its KV heads are, copies and padding included, and stacked by stage;
    None: the default device.
    """
    if stored:
        scales = _laid_out(model, stored, mesh)
    else:
        largest = measure(model, dtype, params, seed, mesh)
        scales = [jnp.maximum(each * (MARGIN / LARGEST), 1e-6) for each in largest]
    return params | {
        "layers": [layer | {"kv_scales": own} for layer, own in zip(params["layers"], scales, strict=True)]
    }


def _of_places(model: ModelConfig, mesh: Mesh | None) -> tuple[int, ...]:
    """-> the shape of the scales of one place of all stages."""
    if mesh is None:
        return (2, model.num_kv_heads)
    heads = split_heads(model.num_kv_heads, model.group, mesh.shape["model"]).all_kv_heads
    return (mesh.shape["stage"], 2, heads) if mesh.shape["stage"] > 1 else (2, heads)


def _split(mesh: Mesh | None) -> Sharding | None:
    if mesh is None or mesh.size == 1:
        return on_all(mesh) if mesh else None
    return NamedSharding(mesh, _spec(mesh))


def _spec(mesh: Mesh) -> PartitionSpec:
    return PartitionSpec("stage", None, "model") if mesh.shape["stage"] > 1 else PartitionSpec(None, "model")


def _laid_out(model: ModelConfig, stored: KVScales, mesh: Mesh | None) -> list[Array]:
    """-> stored scales for each place. A copy of a KV head has its scales; what padding has changes nothing."""
    stages = mesh.shape["stage"] if mesh else 1
    split = split_heads(model.num_kv_heads, model.group, mesh.shape["model"] if mesh else 1)
    head_of = np.minimum(np.arange(split.all_kv_heads) // split.copies, model.num_kv_heads - 1)
    one = np.ones((2, 1), np.float32)
    of = lambda layer: np.broadcast_to(stored.get(layer, one), (2, model.num_kv_heads))[:, head_of]
    made = []
    for place in stage_layers(model.layers, stages):
        scales = np.stack([of(layer) for layer in place]).reshape(_of_places(model, mesh))
        where = _split(mesh)
        made.append(
            jnp.asarray(scales)
            if where is None
            else jax.make_array_from_callback(scales.shape, where, scales.__getitem__)
        )
    return made


def measure(model: ModelConfig, dtype: str, params: Params, seed: int, mesh: Mesh | None = None) -> list[Array]:
    """-> for each layer the largest key and value of each head, [2, kv_heads] float32, over random tokens.

    On a mesh for each place, as with_scales has them.
    """
    count = min(TOKENS, model.max_model_len)
    tokens = jax.random.randint(jax.random.key(seed), (count,), 0, model.vocab_size, jnp.int32)
    if mesh is None or mesh.size == 1:
        return jax.jit(partial(_measure, model, dtype, ALONE))(params, jax.device_put(tokens, _split(mesh)))
    run = jax.shard_map(
        partial(_measure, model, dtype, axes_of(mesh)), mesh=mesh, check_vma=False,
        in_specs=(jax.tree.map(lambda a: a.sharding.spec, params), PartitionSpec()), out_specs=_spec(mesh),
    )  # fmt: skip
    return jax.jit(run)(params, jax.device_put(tokens, on_all(mesh)))


def _measure(model: ModelConfig, dtype: str, axes: Axes, params: Params, tokens: Array) -> list[Array]:
    count = tokens.shape[0]
    pages, positions = -(-count // PAGE), jnp.arange(count, dtype=jnp.int32)
    batch = RaggedBatch(
        page_table=jnp.arange(pages, dtype=jnp.int32)[None],
        kv_lens=jnp.full(1, count, jnp.int32),
        cu_q_lens=jnp.array([0, count], jnp.int32),
        num_rows=jnp.int32(1),
        num_decodes=jnp.int32(count == 1),
        write_page=positions // PAGE,
        write_offset=positions % PAGE,
    )

    def start(layer: int) -> Any:
        spec = attention_spec(model, layer, axes.model.size)
        cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), xla.cache_spec(spec, pages, PAGE, dtype))
        return cache, jnp.zeros((2, spec.num_kv_heads))

    wide = [start(place[0] or 0) for place in stage_layers(model.layers, axes.stage.size)]
    _, seen = forward(model, RECORDER, params, wide, tokens, positions, batch, axes)
    return [largest[None] if axes.stage.size > 1 else largest for _, largest in seen]


def _record(
    q: Array, k: Array, v: Array, cache: Any, batch: RaggedBatch, spec: AttentionSpec, **options: Any
) -> tuple[Array, Any]:
    """As xla.update_and_attend, with the largest of all keys and values beside the cache."""
    valid = (jnp.arange(k.shape[0]) < batch.cu_q_lens[-1])[:, None, None]  # a stage that has nothing to do computes too
    sizes = [jnp.where(valid, jnp.abs(part.astype(jnp.float32)), 0) for part in (k, v)]
    largest = jnp.stack([jnp.max(size, axis=(0, 2)) for size in sizes])
    out, kept = xla.update_and_attend(q, k, v, cache[0], batch, spec, **options)
    return out, (kept, jnp.maximum(cache[1], largest))


RECORDER = Backend("recorder", (), xla.supports, xla.cache_spec, _record)
