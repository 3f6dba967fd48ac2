"""The dtypes a KV cache may have, and how a key or value becomes one: divided by its scale, and kept in range."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

KV_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")


def stored(x: Array, scale: Array | None, dtype: jnp.dtype) -> Array:
    """x [T, K, D], scale [K] float32 or None -> x / scale as the cache's dtype, rounded to nearest, and once.

    What is out of range becomes the largest value: an e4m3 cast would make it NaN.
    """
    if scale is not None:
        x = x.astype(jnp.float32) / scale[None, :, None]
    if jnp.dtype(dtype).itemsize > 1:
        return x.astype(dtype)
    integer = jnp.issubdtype(dtype, jnp.integer)
    limit = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    return jnp.clip(jnp.round(x) if integer else x, -limit, limit).astype(dtype)
