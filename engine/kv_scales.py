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

from engine.models.config import ModelConfig
from engine.models.params import Params
from engine.models.transformer import attention_spec, forward
from engine.weights.kv_scales import KVScales
from kernels import xla
from kernels.attention import AttentionSpec, Backend, RaggedBatch

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


def abstract_scales(model: ModelConfig, params: Params) -> Params:
    """-> shapes of parameters, with each layer's scales."""
    scales = jax.ShapeDtypeStruct((2, model.num_kv_heads), jnp.float32)
    return params | {"layers": [layer | {"kv_scales": scales} for layer in params["layers"]]}


def with_scales(model: ModelConfig, dtype: str, params: Params, stored: KVScales, seed: int) -> Params:
    """-> the parameters with each layer's scales [2, kv_heads] float32: stored ones (1 where a layer lacks them), or
    measured ones."""
    shape = (2, model.num_kv_heads)
    if stored:
        one = np.ones(shape, np.float32)
        scales = [jnp.asarray(np.broadcast_to(stored.get(i, one), shape)) for i in range(len(model.layers))]
    else:
        scales = [jnp.maximum(largest * (MARGIN / LARGEST), 1e-6) for largest in measure(model, dtype, params, seed)]
    return params | {
        "layers": [layer | {"kv_scales": own} for layer, own in zip(params["layers"], scales, strict=True)]
    }


def measure(model: ModelConfig, dtype: str, params: Params, seed: int) -> list[Array]:
    """-> for each layer the largest key and value of each head, [2, kv_heads] float32, over random tokens."""
    count = min(TOKENS, model.max_model_len)
    tokens = jax.random.randint(jax.random.key(seed), (count,), 0, model.vocab_size, jnp.int32)
    return jax.jit(partial(_measure, model, dtype))(params, tokens)


def _measure(model: ModelConfig, dtype: str, params: Params, tokens: Array) -> list[Array]:
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

    def caches(i: int) -> Any:
        return jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), xla.cache_spec(attention_spec(model, i), pages, PAGE, dtype)
        )

    wide = [(caches(i), jnp.zeros((2, model.num_kv_heads))) for i in range(len(model.layers))]
    _, seen = forward(model, RECORDER, params, wide, tokens, positions, batch)
    return [largest for _, largest in seen]


def _record(
    q: Array, k: Array, v: Array, cache: Any, batch: RaggedBatch, spec: AttentionSpec, **options: Any
) -> tuple[Array, Any]:
    """As xla.update_and_attend, with the largest of all keys and values beside the cache."""
    largest = jnp.stack([jnp.max(jnp.abs(part.astype(jnp.float32)), axis=(0, 2)) for part in (k, v)])
    out, kept = xla.update_and_attend(q, k, v, cache[0], batch, spec, **options)
    return out, (kept, jnp.maximum(cache[1], largest))


RECORDER = Backend("recorder", (), xla.supports, xla.cache_spec, _record)
