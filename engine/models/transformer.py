"""The transformer of every family: embed, layers of attention and MLP, final norm, and the logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.models.config import ModelConfig
from engine.models.layers import apply_rope, gated_mlp, project, rms_norm, rope_tables
from engine.models.params import Params
from kernels.attention import AttentionSpec, Backend, RaggedBatch


def attention_spec(config: ModelConfig, index: int) -> AttentionSpec:
    """-> what layer `index` asks of the attention backend."""
    layer = config.layers[index]
    scale = config.head_dim**-0.5
    return AttentionSpec(config.num_kv_heads, config.group, config.head_dim, scale, window=layer.window)


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
    with jax.named_scope("embed"):
        x = params["embed"][tokens]
    ropes = {layer.rope: rope_tables(layer.rope, positions) for layer in config.layers if layer.rope is not None}
    caches = []
    for i, (layer, weights) in enumerate(zip(config.layers, params["layers"], strict=True)):
        rope = ropes[layer.rope] if layer.rope is not None else None
        x, cache = _layer(config, backend, attention_spec(config, i), weights, kv_caches[i], x, rope, batch)
        caches.append(cache)
    return rms_norm(x, params["final_norm"], config.norm_eps), caches


@partial(jax.jit, static_argnums=(0, 1, 2))  # traced and lowered once for all layers that are alike; XLA inlines it
def _layer(
    config: ModelConfig,
    backend: Backend,
    spec: AttentionSpec,
    p: Params,
    kv_cache: Any,
    x: Array,
    rope: tuple[Array, Array] | None,
    batch: RaggedBatch,
) -> tuple[Array, Any]:
    with jax.named_scope("attention"):
        h = rms_norm(x, p["attn_norm"], config.norm_eps)
        qkv = project(h, p["qkv"])
        if config.qkv_bias:
            qkv = qkv + p["qkv_bias"][None]
        q, k, v = qkv[:, :, : config.group], qkv[:, :, config.group], qkv[:, :, config.group + 1]
        if config.qk_norm:
            q, k = rms_norm(q, p["q_norm"], config.norm_eps), rms_norm(k, p["k_norm"], config.norm_eps)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        # A masked value still meets a weight of 0, and 0 * NaN is NaN: one bad row must not reach others through pages.
        v = jnp.where(jnp.isfinite(v), v, jnp.zeros_like(v))
        attended, kv_cache = backend.update_and_attend(q, k, v, kv_cache, batch, spec)
        x = x + attended.reshape(x.shape[0], -1) @ p["out"].reshape(-1, x.shape[1])
    with jax.named_scope("mlp"):
        h = rms_norm(x, p["mlp_norm"], config.norm_eps)
        return x + gated_mlp(h, p["gate_up"], p["down"], config.activation), kv_cache


def logits(params: Params, hidden: Array) -> Array:
    """hidden [R, D] -> logits [R, V] float32."""
    with jax.named_scope("logits"):
        head = params.get("lm_head", params["embed"])
        return jnp.einsum("rd,vd->rv", hidden, head, preferred_element_type=jnp.float32)
