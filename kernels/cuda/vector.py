"""Products of one token, or a few, with a weight on NVIDIA GPUs: in Triton, without tensor cores, one launch each.

So few tokens leave a product nothing to do but to read its weight. Every thread reads 16 bytes of it at a time and
keeps sums of its own, in float32, until the end; activations that a format wants narrow are made so on the way, by
each program for itself. Nothing is left over for a second kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.activations import LEAST
from kernels.cuda.matrix import Tile, view
from kernels.cuda.tile import Tiles, launch
from kernels.quantized import QuantizedTensor

MOST_TOKENS = 4
LEAST_ROWS = 8  # outputs that share scales, so that a program's columns may
LEAST_GROUP = 16  # inputs that a thread reads at once, at most
MAGIC = 128  # what numbers of four bits are larger by when they are taken from their bytes
ROUND = 1.5 * 2**23  # a float32 that large has no fraction
LIMITS = {"int8": 127.0, "fp8": 448.0}
int32, float32 = jnp.int32, jnp.float32


def supports(weight: QuantizedTensor) -> str | None:
    """-> None, or why `rows_product` cannot take a weight [N, K]."""
    layout, K = weight.layout, weight.inputs
    group = K // weight.scales.shape[-1]
    if layout.format not in ("int8", "fp8", "int4"):
        return f"no weights of {layout.format}"
    if layout.activations == "token_group" and layout.rows % LEAST_ROWS:
        return f"no blocks of {layout.rows} outputs: multiples of {LEAST_ROWS} only"
    if layout.packing == 2 and layout.split & (layout.split - 1):
        return f"no runs of {layout.split} bytes: powers of two only"
    if K & -K < LEAST_GROUP or (group < K and (group & (group - 1) or group < LEAST_GROUP)):
        return f"no {K} inputs in groups of {group}: powers of two from {LEAST_GROUP} on only"
    return None


def rows_product(
    x: Array, weight: Array | QuantizedTensor, dtype: jnp.dtype, *, tile: Tile, interpret: bool = False
) -> Array:
    """x [M, K], M up to MOST_TOKENS, weight [N, K] -> [M, N] in `dtype`.

    A turn reads tile.stages blocks of [tile.columns, tile.depth] of the weight's stored numbers.
    """
    quantized = weight if isinstance(weight, QuantizedTensor) else None
    values = weight.values if isinstance(weight, QuantizedTensor) else weight
    (M, K), (N, width) = x.shape, values.shape
    depth, columns = min(tile.depth, width & -width), tile.columns
    if quantized and quantized.layout.activations == "token_group":  # whole groups, whose scales the columns share
        rows = quantized.layout.rows
        depth, columns = max(depth, K // quantized.scales.shape[1]), min(columns, rows & -rows)
    optional = {name: getattr(quantized, name, None) for name in ("scales", "zeros", "minima")}
    given = {name: array for name, array in optional.items() if array is not None}

    def kernel(x: Any, values: Any, *refs: Any) -> None:
        *arrays, out = refs
        own = pl.program_id(0) * columns + jnp.arange(columns, dtype=int32)
        column = own if N % columns == 0 else jnp.minimum(own, N - 1)  # the last repeated past the end
        named = dict(zip(given, arrays, strict=True))
        parts = quantized and _Parts(quantized, named, pl.program_id(0) * columns, column, depth, interpret)
        factors = [parts.token_scale(x, m) for m in range(M)] if parts else []

        def load(start: Array) -> Array:
            return plgpu.load(view(values, column, start + jnp.arange(depth, dtype=int32)))

        def add(totals: Sequence[Array], block: Array, start: Array) -> Sequence[Array]:
            for half in range(K // width):
                w = parts.numbers(block, start, half) if parts else block.astype(float32)
                a = [
                    parts.activations(_token(x, m, parts.inputs(start, 1, half)), start, factors[m])
                    if parts
                    else _token(x, m, start + jnp.arange(depth, dtype=int32))
                    for m in range(M)
                ]
                totals = [fma(w, a[m][None, :], total, interpret) for m, total in enumerate(totals)]
            return totals

        zeros = [jnp.zeros((columns, depth), float32)] * M
        for m, total in enumerate(_turns(load, add, zeros, width // depth, depth, tile.stages)):
            y = jnp.sum(total, axis=1)
            _store(out, m, own, parts.finish(y, factors[m]) if parts else y, N)

    out = jax.ShapeDtypeStruct((M, N), dtype)
    tiles = Tiles(M, depth, tile.warps, 1)
    grid = (pl.cdiv(N, columns),)
    return launch(kernel, [x, values, *given.values()], out, grid=grid, tiles=tiles, interpret=interpret)


class _Parts(NamedTuple):
    """A quantized weight as a program sees it, which has some columns of its outputs and blocks of `depth`."""

    weight: QuantizedTensor  # for its layout and shapes
    refs: dict[str, Any]
    first: Array
    column: Array  # [C]
    depth: int
    interpret: bool

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.weight.inputs // self.weight.scales.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether a row's numbers share a scale, which their sum is multiplied with, and have no zeros of their own."""
        one_scale = self.weight.scales.shape[1] == 1 and self.weight.layout.activations != "token_group"
        return one_scale and list(self.refs) == ["scales"]

    def inputs(self, start: Array, step: int, half: int) -> Array:
        """-> which inputs every `step`th of a block's numbers is; the block begins at `start`. Of a byte, one half."""
        place, split = start + step * jnp.arange(self.depth // step, dtype=int32), self.weight.layout.split
        return place if not split else place + (lax.div(place, int32(split)) + half) * split

    def numbers(self, block: Array, start: Array, half: int) -> Array:
        """block [C, depth] as stored -> numbers in float32, scaled unless sums or activations will be."""
        layout = self.weight.layout
        w, zero = (block.astype(float32), 0.0) if not layout.split else (nibbles(block, half, self.interpret), MAGIC)
        if layout.split and not {"zeros", "minima"} & self.refs.keys():
            zero += 8.0
        if self.is_whole or layout.activations != "none":
            return w - zero if zero else w
        length = min(self.group, layout.split or self.group, self.depth)  # of neighbours that share a scale
        first = self.inputs(start, length, half)
        scale = self.entries("scales", first)
        zeros = zero + self.entries("zeros", first) if "zeros" in self.refs else zero
        offset = self.entries("minima", first) - zeros * scale if "minima" in self.refs else -zeros * scale
        spread = lambda x: jnp.broadcast_to(x[:, :, None], (*x.shape, length)).reshape(block.shape)
        return fma(w, spread(scale), spread(offset), self.interpret)

    def entries(self, name: str, inputs: Array) -> Array:
        """-> what an array has for these inputs of every column: [C, inputs] float32."""
        row = lax.div(self.column, int32(self.weight.layout.rows)) if name == "scales" else self.column
        return plgpu.load(view(self.refs[name], row, lax.div(inputs, int32(self.group)))).astype(float32)

    def token_scale(self, x: Any, m: int) -> Array | None:
        """-> what token m's numbers stand for when they are narrow, [] float32, if all of them share it."""
        if self.weight.layout.activations != "token":
            return None

        def turn(i: Array, most: Array) -> Array:
            return jnp.maximum(most, jnp.abs(_token(x, m, i * self.depth + jnp.arange(self.depth, dtype=int32))))

        most = lax.fori_loop(0, self.weight.inputs // self.depth, turn, jnp.zeros(self.depth, float32))
        return jnp.maximum(jnp.max(most), LEAST) / LIMITS[self.weight.layout.format]

    def activations(self, a: Array, start: Array, token_scale: Array | None) -> Array:
        """a [depth], a token's inputs from `start` on -> as the product takes them, in float32."""
        if token_scale is not None:
            return self.narrowed(a / token_scale)
        if self.weight.layout.activations == "none":
            return a
        groups = a.reshape(-1, self.group)
        scale = jnp.maximum(jnp.max(jnp.abs(groups), axis=1), LEAST) / LIMITS[self.weight.layout.format]
        index = lax.div(start, int32(self.group)) + jnp.arange(groups.shape[0], dtype=int32)
        block = lax.div(self.first, int32(self.weight.layout.rows))
        of_weight = plgpu.load(self.refs["scales"].at[jnp.broadcast_to(block, index.shape), index]).astype(float32)
        return (self.narrowed(groups / scale[:, None]) * (scale * of_weight)[:, None]).reshape(a.shape)

    def narrowed(self, a: Array) -> Array:
        """-> a as far as numbers of the weight's type can be it, in float32."""
        limit = LIMITS[self.weight.layout.format]
        a = jnp.clip(a, -limit, limit)
        if self.weight.layout.format == "int8":
            return jnp.round(a) if self.interpret else (a + ROUND) - ROUND
        return a.astype(jnp.float8_e4m3fn).astype(float32)

    def finish(self, y: Array, token_scale: Array | None) -> Array:
        """y [C], sums over all inputs -> the product."""
        if self.is_whole:
            row = lax.div(self.column, int32(self.weight.layout.rows))
            y *= plgpu.load(self.refs["scales"].at[row, jnp.zeros_like(row)]).astype(float32)
        return y if token_scale is None else y * token_scale


def nibbles(packed: Array, half: int, interpret: bool) -> Array:
    """packed uint8 [R, C] -> its low or high four bits plus MAGIC, in float32 [R, C].

    0x43 and a byte below 128 are the upper half of a float32 that is 128 and more.
    """
    if interpret:
        return (packed >> jnp.uint8(4 * half) & jnp.uint8(15)).astype(float32) + MAGIC
    shift = f"shr.b32 four, $4, {4 * half}; and.b32 four, four, 0x0F0F0F0F;"
    each = " ".join(f"prmt.b32 ${i}, four, 0x43, 0x4{i}55;" for i in range(4))
    return _asm(f"{{ .reg .b32 four; {shift} {each} }}", [packed], "=r,=r,=r,=r,r", 4)


def fma(a: Array, b: Array, c: Array, interpret: bool) -> Array:
    """-> a * b + c in float32, in one instruction: XLA lets Triton make none of two."""
    a, b = jnp.broadcast_to(a, c.shape), jnp.broadcast_to(b, c.shape)
    return a * b + c if interpret else _asm("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], "=f,f,f,f", 1)


def _asm(text: str, inputs: list[Array], constraints: str, pack: int) -> Array:
    out = jax.ShapeDtypeStruct(inputs[0].shape, float32)
    return plgpu.elementwise_inline_asm(
        text, args=inputs, constraints=constraints, pack=pack, result_shape_dtypes=[out]
    )[0]


def _token(x: Any, m: int, inputs: Array) -> Array:
    """-> inputs [P] of token m, in float32."""
    return plgpu.load(x.at[jnp.full(inputs.shape, m, int32), inputs]).astype(float32)


def _turns(
    load: Callable[[Array], Array],
    add: Callable[[Sequence[Array], Array, Array], Sequence[Array]],
    totals: Sequence[Array],
    blocks: int,
    depth: int,
    together: int,
) -> Sequence[Array]:
    """-> totals after `blocks` blocks of `depth`, of which `together` are on their way at a time."""

    def turn(first: Array, totals: Sequence[Array], count: int) -> Sequence[Array]:
        starts = [(first + i) * depth for i in range(count)]
        for start, block in zip(starts, [load(start) for start in starts], strict=True):
            totals = add(totals, block, start)
        return list(totals)

    totals = lax.fori_loop(0, blocks // together, lambda i, t: turn(i * together, t, together), list(totals))
    rest = blocks % together
    return turn(jnp.int32(blocks - rest), totals, rest) if rest else totals


def _store(out: Any, m: int, own: Array, y: Array, N: int) -> None:
    """Write y [C] as token m's outputs `own`. Writes past the end go nowhere."""
    at = jnp.where(own < N, own, N)  # the interpreter drops what is written past the end
    plgpu.store(out.at[jnp.full(own.shape, m, int32), at], y.astype(out.dtype), mask=own < N)
