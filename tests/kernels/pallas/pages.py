"""Pages filled without the kernel, so that a test of the kernel starts from a cache that it did not write."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import AttentionSpec
from kernels.pallas.layout import layout_of
from kernels.storage import stored

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def fill(
    spec: AttentionSpec, cache: jax.Array, table: np.ndarray, befores: np.ndarray, keys: list[np.ndarray],
    values: list[np.ndarray], dtype: str, kv_scales: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """-> the cache with the first befores[row] tokens of keys and values [L, K, D] in each row's pages."""
    layout, page, D = layout_of(spec), cache.shape[2], spec.head_dim
    pages = np.array(cache.astype(jnp.float32))
    parts = [(keys, 0), (values, layout.value_lane)] if spec.value_dim is None else [(keys, 0)]
    for part, (rows, lane) in enumerate(parts):
        scale = None if kv_scales is None else kv_scales[part]
        for row, count in enumerate(befores):
            kept = np.asarray(stored(jnp.asarray(rows[row][:count], dtype), scale, cache.dtype).astype(jnp.float32))
            at = np.arange(count)
            for head in range(spec.num_kv_heads):
                channel = head if part == 0 else layout.value_channel(head)
                pages[table[row, at // page], channel, at % page, lane : lane + D] = kept[:, head]
                # What pads a tile takes part in products, so it must be what the kernel writes there.
                if part == 0:
                    used = D + (D if layout.value_lane else 0)
                    pages[table[row, at // page], channel, at % page, used:] = 0
                    if layout.value_lane:
                        pages[table[row, at // page], channel, at % page, D : layout.value_lane] = 0
                elif layout.value_lane == 0:
                    pages[table[row, at // page], channel, at % page, D:] = 0
    return jnp.asarray(pages).astype(cache.dtype)
