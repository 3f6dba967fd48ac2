"""The pieces of a transformer layer, as pure functions. Each mechanism is written here once, for all families."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from engine.models.config import RopeSpec

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x [..., D], weight [D] -> [..., D] in x's dtype; the mean of squares in float32 (Zhang & Sennrich 2019)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.float32(eps))
    return y.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def rope_frequencies(spec: RopeSpec) -> Array:
    """-> [dim / 2] float32, radians per position."""
    exponent = jnp.arange(0, spec.dim, 2, dtype=jnp.float32) / jnp.float32(spec.dim)
    frequency = 1.0 / jnp.float32(spec.theta) ** exponent
    if spec.kind == "linear":
        return frequency / jnp.float32(spec.factor)
    if spec.kind == "llama3":
        turns = jnp.float32(spec.original_max_len / (2 * math.pi)) * frequency  # over the original context
        smooth = (turns - spec.low_freq_factor) / jnp.float32(spec.high_freq_factor - spec.low_freq_factor)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * frequency / jnp.float32(spec.factor) + smooth * frequency
    assert spec.kind == "default", spec.kind
    return frequency


def rope_tables(spec: RopeSpec, positions: Array) -> tuple[Array, Array]:
    """positions [T] -> cos, sin, each [T, dim / 2] float32."""
    angle = positions.astype(jnp.float32)[:, None] * rope_frequencies(spec)[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Array, tables: tuple[Array, Array]) -> Array:
    """x [T, ..., head_dim] rotated by its position's angles (Su et al. 2021, eq. 34), halves as pairs, in x's dtype."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (-1,)
    cos, sin = (table.reshape(shape) for table in tables)
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def project(x: Array, weight: Array) -> Array:
    """x [T, D], weight [D, ...] -> [T, ...]. One plain product: an einsum over several axes may copy the weight."""
    return (x @ weight.reshape(weight.shape[0], -1)).reshape(x.shape[0], *weight.shape[1:])


def gated_mlp(x: Array, gate_up: Array, down: Array, activation: str) -> Array:
    """x [T, D], gate_up [D, 2, F], down [F, D] -> [T, D] (SwiGLU, Shazeer 2020)."""
    y = project(x, gate_up)
    return (ACTIVATIONS[activation](y[:, 0]) * y[:, 1]) @ down
