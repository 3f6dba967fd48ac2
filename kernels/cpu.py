"""Products of a few tokens with packed weights on a CPU, in integers: a decode reads 4 bits a weight and not 32.

Activations become int16 with one scale for 64 inputs, 2 ** -16 of the largest of them off at most. Sums of 64 products
are exact in int32, and LLVM makes them of the processor's int16 dot products (vpmaddwd, vpdpwssd), provided that each
is a sum of 32 pairs whose factors are there in memory: this form, and no other that was tried. So a window of 64
inputs is multiplied as often as it has groups, with zeros for the inputs of other groups.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels.quantized import QuantizedTensor, superscaled

WINDOW = 64
SPLIT = WINDOW // 2  # what packed weights must have
MOST_TOKENS = 4  # with more, unpacking the weight once is less work
FORMATS = ("int8", "int4", "q4_k")
LIMIT = np.float32(32767)


def supports(tokens: int, weight: QuantizedTensor) -> bool:
    """-> whether `few_tokens` takes this many tokens and this weight."""
    layout = weight.layout
    group = layout.group or weight.inputs
    return (
        tokens <= MOST_TOKENS
        and layout.format in FORMATS
        and layout.activations == "none"
        and layout.rows == 1
        and layout.split in (0, SPLIT)
        and weight.inputs % WINDOW == 0
        and (group % WINDOW == 0 or WINDOW % group == 0)
    )


def few_tokens(x: Array, weight: QuantizedTensor, dtype: jnp.dtype) -> Array:
    """x [T, K], weight [N, K] -> [T, N] in `dtype`."""
    layout = weight.layout
    tokens, inputs = x.shape
    groups = WINDOW // min(layout.group or inputs, WINDOW)  # of a window
    windows = inputs // WINDOW
    narrow, step = _narrow(x.reshape(tokens * windows, WINDOW))
    placed = _placed(narrow, groups, layout.packing).reshape(tokens, windows, groups, SPLIT, 2)
    placed = placed.swapaxes(0, 1).reshape(1, windows, tokens * groups, SPLIT, 2)
    first, second = _pairs(weight)
    sums = jnp.sum(first * placed[..., 0] + second * placed[..., 1], axis=-1)  # [N, windows, T * groups]

    step = step.reshape(tokens, windows, 1)
    totals = narrow.reshape(tokens, windows, groups, -1).sum(axis=-1)  # of narrow activations, [T, windows, groups]
    sums = sums.reshape(-1, windows, tokens, groups)
    scales, minima = _of_windows(superscaled(weight.scales, weight.super_scales), windows, groups), None
    if weight.zeros is not None:
        zeros = _of_windows(weight.zeros, windows, groups).astype(jnp.int32)
        sums = sums - zeros[:, :, None] * totals.swapaxes(0, 1)[None]
    elif layout.format == "int4" and weight.minima is None:
        sums = sums - 8 * totals.swapaxes(0, 1)[None]
    elif weight.minima is not None:
        minima = _of_windows(superscaled(weight.minima, weight.super_minima), windows, groups)
    rows = []
    for token in range(tokens):
        own = step[token].reshape(1, windows, 1)
        y = sums[:, :, token].astype(jnp.float32) * (scales * own)
        if minima is not None:
            offsets = minima * (totals[token].astype(jnp.float32) * step[token])[None]
            y = y - offsets if layout.format == "q4_k" else y + offsets
        y = y.reshape(-1, windows * groups)
        rows.append(y @ jnp.ones(y.shape[1]))  # a sum that XLA vectorizes
    return jnp.stack(rows).astype(dtype)


def _narrow(windows: Array) -> tuple[Array, Array]:
    """windows [n, 64] -> int32 of 16 bits [n, 64], and what one step of each window is, [n, 1] float32."""
    windows = windows.astype(jnp.float32)
    step = jnp.max(jnp.abs(windows), axis=-1, keepdims=True) / LIMIT
    return jnp.round(windows / jnp.where(step == 0, 1.0, step)).astype(jnp.int32), step


def _placed(narrow: Array, groups: int, packing: int) -> Array:
    """narrow [n, 64] -> int32 [n, groups * 32 * 2]: each group's inputs in the order of the weight's pairs, and zeros.

    As a product with ones and zeros: XLA would work out anything else anew for every output.
    """
    index = np.arange(WINDOW)
    pair, half = (index // 2, index % 2) if packing == 1 else (index % SPLIT, index // SPLIT)
    places = np.zeros((WINDOW, groups, SPLIT, 2), np.int32)
    places[index, index * groups // WINDOW, pair, half] = 1
    placed = jnp.matmul(narrow, jnp.asarray(places.reshape(WINDOW, -1)))
    return placed.astype(jnp.int16).astype(jnp.int32)  # so that LLVM knows their range


def _pairs(weight: QuantizedTensor) -> tuple[Array, Array]:
    """-> both values of each pair, int32 [N, windows, 1, 32]."""
    if weight.layout.packing == 1:
        pairs = weight.values.reshape(weight.values.shape[0], -1, 1, SPLIT, 2).astype(jnp.int32)
        return pairs[..., 0], pairs[..., 1]
    packed = weight.values.reshape(weight.values.shape[0], -1, 1, SPLIT)
    return (packed & jnp.uint8(15)).astype(jnp.int32), (packed >> jnp.uint8(4)).astype(jnp.int32)


def _of_windows(x: Array, windows: int, groups: int) -> Array:
    """x [N, K / group] -> [N, windows, groups]."""
    if groups == 1:
        x = jnp.repeat(x, windows // x.shape[1], axis=1, total_repeat_length=windows)
    return x.reshape(x.shape[0], windows, groups)
