"""The dtypes a KV cache may have, and how a key or value becomes one: divided by its scale, and kept in range."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

KV_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")


def stored(x: Array, scale: Array | None, dtype: jnp.dtype) -> Array:
    """x [T, K, D], scale [K] float32 or None -> x / scale as the cache's dtype, rounded to nearest, and once.

    What is out of range becomes the largest value: an e4m3 cast would make it NaN.
    """
    if scale is not None:
        x = x.astype(jnp.float32) / scale[None, :, None]
    return in_range(x, dtype).astype(dtype)


def in_range(x: Array, dtype: jnp.dtype, rounded: Callable[[Array], Array] = jnp.round) -> Array:
    """-> x such that a cast to a dtype of one byte neither overflows nor rounds an integer down.

    `rounded` rounds to the nearest integer, where a kernel has its own way of doing that.
    """
    if jnp.dtype(dtype).itemsize > 1:
        return x
    if not jnp.issubdtype(dtype, jnp.integer):
        limit = float(jnp.finfo(dtype).max)
        return jnp.clip(x, -limit, limit)
    limit = float(jnp.iinfo(dtype).max)
    return rounded(jnp.clip(x, -limit, limit))
