"""Products of a few tokens with packed weights on a CPU: a decode reads 4 or 8 bits a weight and not 32.

LLVM may not reorder a sum of floats, and so makes slow code of a fusion that unpacks a weight and sums over its inputs.
These fusions sum over no axis: neighbouring inputs lie side by side in LANES, which become a vector of the processor,
and the next ones are added to them, term by term, written out. The lanes are summed last, by a product with ones, which
XLA vectorizes.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jax import Array

from kernels.quantized import QuantizedTensor, superscaled

LANES = 16
SPLIT = LANES  # what packed weights must have
WINDOW = 2 * LANES  # inputs of a term
MOST_WINDOWS = 48  # that are written out; a weight with more inputs is multiplied in pieces
MOST_TOKENS = 2  # written out: with more, compiling takes too long, a minute for four
FORMATS = ("int8", "int4", "q4_k")


def supports(tokens: int, weight: QuantizedTensor) -> bool:
    """-> whether `few_tokens` takes this many tokens and this weight."""
    layout = weight.layout
    group = layout.group or WINDOW
    return (
        tokens <= MOST_TOKENS
        and layout.format in FORMATS
        and layout.activations == "none"
        and layout.rows == 1
        and layout.split in (0, SPLIT)
        and weight.inputs % WINDOW == group % WINDOW == 0
        and group <= MOST_WINDOWS * WINDOW
    )


def few_tokens(x: Array, weight: QuantizedTensor, dtype: jnp.dtype) -> Array:
    """x [T, K], weight [N, K] -> [T, N] in `dtype`, computed in float32."""
    arrays, count = (x.astype(jnp.float32), weight), pieces(weight)
    if count == 1:
        return _product(*arrays).astype(dtype)

    def turn(i: Array, y: Array) -> Array:
        def cut(a: Array) -> Array:
            size = a.shape[-1] // count
            return a if size == 0 else jax.lax.dynamic_slice_in_dim(a, i * size, size, axis=1)

        return y + _product(*jax.tree.map(cut, arrays))

    start = jnp.zeros((x.shape[0], weight.values.shape[0]))
    return jax.lax.fori_loop(0, count, turn, start).astype(dtype)


def pieces(weight: QuantizedTensor) -> int:
    """-> how many pieces a weight's inputs are cut in: no more windows than MOST_WINDOWS in each, and whole groups."""
    widths = [weight.inputs // WINDOW, *(a.shape[-1] for a in jax.tree.leaves(weight) if a.shape[-1] > 1)]
    fewest = -(-widths[0] // MOST_WINDOWS)
    return next(count for count in range(fewest, widths[0] + 1) if all(width % count == 0 for width in widths))


def _product(x: Array, weight: QuantizedTensor) -> Array:
    """x [T, K] float32, weight [N, K] -> [T, N] float32."""
    group = weight.layout.group or weight.inputs
    scales = superscaled(weight.scales, weight.super_scales)
    windows = range(0, group, WINDOW)
    first, second = zip(*(_numbers(weight, at) for at in range(0, weight.inputs, WINDOW)), strict=True)

    def term(token: Array, at: int) -> Array:
        """-> the inputs `at` and on of one token, times the numbers of the weight, [N, LANES]."""
        low, high = token[None, at : at + LANES], token[None, at + LANES : at + WINDOW]
        return first[at // WINDOW] * low + second[at // WINDOW] * high

    def of_group(token: Array, g: int) -> Array:
        return reduce(add, (term(token, g * group + at) for at in windows)) * scales[:, g : g + 1]

    offsets = _offsets(weight, scales)
    rows: list[Array] = []
    for token in x:
        y = _sum(reduce(add, (of_group(token, g) for g in range(weight.inputs // group))))
        if offsets is not None:
            y = y + _sum(offsets * token.reshape(-1, group).sum(axis=-1)[None])
        rows.append(y)
    return jnp.stack(rows)


def _numbers(weight: QuantizedTensor, at: int) -> tuple[Array, Array]:
    """-> the stored numbers of LANES inputs from `at` on, and of as many behind them, each [N, LANES] float32."""
    if weight.layout.packing == 1:
        numbers = weight.values[:, at : at + WINDOW].astype(jnp.float32)
        return numbers[:, :LANES], numbers[:, LANES:]
    packed = weight.values[:, at // 2 : at // 2 + LANES]
    return (packed & jnp.uint8(15)).astype(jnp.float32), (packed >> jnp.uint8(4)).astype(jnp.float32)


def _offsets(weight: QuantizedTensor, scales: Array) -> Array | None:
    """-> what is added to each scaled number of a group, [N, K / group] float32, if anything is."""
    if weight.minima is not None:
        minima = superscaled(weight.minima, weight.super_minima)
        return -minima if weight.layout.format == "q4_k" else minima
    if weight.zeros is not None:
        return weight.zeros.astype(jnp.float32) * -scales
    return -8 * scales if weight.layout.format == "int4" else None


def _sum(y: Array) -> Array:
    """[N, n] -> [N]."""
    return y @ jnp.ones(y.shape[1])
