"""The pieces of a transformer layer, as pure functions. Each mechanism is written once, for all families."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kernels.product import product
from kernels.quantized import Weight
from sharding.axes import Axis

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x [..., *D], weight [*D] -> [..., *D] in x's dtype, normalised over D (Zhang & Sennrich 2019).

    The mean of squares is float32; the product with the weight is of the weight's dtype.
    """
    axes = tuple(range(-weight.ndim, 0))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + jnp.float32(eps))
    return (y.astype(weight.dtype) * weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)).astype(x.dtype)


def rms_norm_over(x: Array, weight: Array, eps: float, width: int, axis: Axis) -> Array:
    """As rms_norm, where D is spread over the devices of a mesh axis and has `width` entries in all."""
    if axis.size == 1:
        return rms_norm(x, weight, eps)
    y = x.astype(jnp.float32)
    total = axis.sum(jnp.sum(y * y, axis=tuple(range(-weight.ndim, 0)), keepdims=True))
    y = y * jax.lax.rsqrt(total / jnp.float32(width) + jnp.float32(eps))
    return (y.astype(weight.dtype) * weight[None]).astype(x.dtype)


def project(x: Array, weight: Weight, bias: Array | None = None) -> Array:
    """x [T, *in], weight [*in, *out], bias [*out] -> [T, *out]."""
    y = product(x, weight)
    return y if bias is None else y + bias[None]


def gated_mlp(
    x: Array,
    gate_up: Weight,
    down: Weight,
    activation: str,
    gate_up_bias: Array | None,
    down_bias: Array | None,
) -> Array:
    """x [T, D], gate_up [D, 2, F], down [F, D], biases [2, F] and [D] -> [T, D] (SwiGLU, Shazeer 2020)."""
    y = project(x, gate_up, gate_up_bias)
    return project(ACTIVATIONS[activation](y[:, 0]) * y[:, 1], down, down_bias)


def soft_cap(x: Array, cap: float) -> Array:
    """-> cap * tanh(x / cap): almost x while small, never beyond cap (Gemma 2, section 2)."""
    return jnp.tanh(x / jnp.asarray(cap, x.dtype)) * jnp.asarray(cap, x.dtype)


def finite(x: Array) -> Array:
    """-> x with 0 for what is not finite.

    A masked value still meets a weight of 0, and 0 * NaN is NaN: one bad row must not reach others through pages.
    """
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
