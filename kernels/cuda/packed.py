"""Products of wide activations with weights in 4, 6 or 8 bits that are unpacked in registers, in Triton.

Numbers that share a scale with all that is multiplied at a time stay whole numbers, and their product is scaled; of
smaller groups each number is. Either way the weight reaches the tensor cores in x's dtype, and sums are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.matrix import Program, Tile, launch_product, view
from kernels.quantized import SUPER, Layout, QuantizedTensor

ARRAYS = ("values", "scales", "zeros", "minima", "high", "super_scales", "super_minima")  # of a QuantizedTensor
LEAST = 16  # inputs that a tensor core takes


def supports(weight: QuantizedTensor) -> str | None:
    """-> None, or why the kernel cannot multiply a weight [N, K]."""
    layout, groups = weight.layout, weight.scales.shape[-1]
    if layout.packing == 2 and layout.split < LEAST:
        return f"no runs of {layout.split} bytes: {LEAST} at least"
    if layout.format == "fp8":
        return "no FP8 without FP8 activations"
    group = weight.inputs // groups
    if groups > 1 and group & (group - 1):
        return f"no groups of {group} inputs: powers of two only"
    if layout.packing == 1 and (weight.inputs & -weight.inputs) < LEAST:
        return f"no {weight.inputs} inputs: multiples of {LEAST} only"
    return None


def packed_product(
    x: Array, weight: QuantizedTensor, dtype: jnp.dtype, *, tile: Tile, interpret: bool = False
) -> Array:
    """x [M, K], weight [N, K] -> [M, N] in `dtype`. A turn is tile.depth inputs of int8, and twice `split` of others."""
    (M, K), layout = x.shape, weight.layout
    N = weight.values.shape[0]
    width = layout.split or min(tile.depth, K & -K)  # inputs of one product
    turns = K // (layout.packing * width * tile.splits)
    assert K == turns * layout.packing * width * tile.splits, (K, layout, tile)
    present = [name for name in ARRAYS if getattr(weight, name) is not None]

    def kernel(x: Any, *refs: Any) -> None:
        *arrays, out = refs
        program = Program.here(tile, M, N)
        parts = Parts(layout, K, dict(zip(present, arrays, strict=True)), program.columns, x.dtype, interpret)

        def turn(i: Array, total: Array) -> Array:
            start = (program.split * turns + i) * width
            values = plgpu.load(view(parts.refs["values"], program.columns, start + jnp.arange(width, dtype=jnp.int32)))
            for half in range(layout.packing):
                begin = start * layout.packing + half * width
                a = program.load_x(x, begin + jnp.arange(width, dtype=jnp.int32))
                b, scale = parts.numbers(values, begin, width, half)
                part = program.dot(a, b)
                total += part if scale is None else part * program.by_column(scale)
            return total

        total = lax.fori_loop(0, turns, turn, jnp.zeros(tile.shape, jnp.float32))
        program.store(out, total, N)

    inputs = [x, *(getattr(weight, name) for name in present)]
    return launch_product(kernel, inputs, (M, N), dtype, tile, interpret)


class Parts(NamedTuple):
    """A weight as a program sees it: references to its arrays, and the columns that are the program's."""

    layout: Layout
    inputs: int
    refs: dict[str, Any]
    columns: Array
    dtype: Any
    interpret: bool

    def numbers(self, values: Array, begin: Array, width: int, half: int) -> tuple[Array, Array | None]:
        """values [columns, width], of which half 0 or 1 holds the inputs from `begin` on.

        -> numbers in x's dtype [columns, width], and what their product is to be scaled with [columns], if anything.
        """
        layout, refs = self.layout, self.refs
        group = self.inputs // refs["scales"].shape[1]
        whole = layout.format in ("int8", "int4") and "minima" not in refs and group % width == 0
        if layout.format == "int8":
            numbers = values
        elif layout.format == "mxfp4":
            numbers = e2m1(values, half)
        else:
            symmetric = layout.format == "int4" and "zeros" not in refs and "minima" not in refs
            numbers = nibbles(values, half, 8 if symmetric else 0, self.interpret)
        if whole:
            numbers = numbers.astype(self.dtype)
            if "zeros" in refs:
                numbers = numbers - self.each("zeros", begin, group)[:, None].astype(self.dtype)
            return numbers, self.each("scales", begin, group)
        numbers = numbers.astype(jnp.float32)
        if layout.format == "q6_k":
            numbers += self.high_bits(begin, width) - 32.0
        if "zeros" in refs:
            numbers -= self.spread("zeros", begin, group, width)
        numbers *= self.scale("scales", "super_scales", begin, group, width)
        if "minima" in refs:
            minima = self.scale("minima", "super_minima", begin, group, width)
            numbers = numbers - minima if layout.format == "q4_k" else numbers + minima
        return numbers.astype(self.dtype), None

    def row(self, name: str) -> Array:
        return self.columns // self.layout.rows if name == "scales" else self.columns

    def each(self, name: str, begin: Array, group: int) -> Array:
        """-> the entry of an array's that covers the input `begin`: [columns] float32."""
        row = self.row(name)
        return plgpu.load(self.refs[name].at[row, jnp.broadcast_to(begin // group, row.shape)]).astype(jnp.float32)

    def spread(self, name: str, begin: Array, group: int, width: int) -> Array:
        """-> an array's entries for the inputs from `begin` on: [columns, width or 1] float32."""
        if group % width == 0:
            return self.each(name, begin, group)[:, None]
        index = begin // group + jnp.arange(width // group, dtype=jnp.int32)
        entries = plgpu.load(view(self.refs[name], self.row(name), index))
        if name == "scales" and self.layout.format == "mxfp4":
            entries = lax.bitcast_convert_type(entries.astype(jnp.int32) << 23, jnp.float32)  # 2 ** (entry - 127)
        shape = (*entries.shape, group)
        return lax.broadcast_in_dim(entries.astype(jnp.float32), shape, (0, 1)).reshape(entries.shape[0], width)

    def scale(self, name: str, over: str, begin: Array, group: int, width: int) -> Array:
        """As `spread`, times the entry of the superblock if the format has some."""
        entries = self.spread(name, begin, group, width)
        return entries * self.each(over, begin, SUPER)[:, None] if over in self.refs else entries

    def high_bits(self, begin: Array, width: int) -> Array:
        """-> 16 times bits 4 and 5 of q6_k's inputs from `begin` on: [columns, width] float32."""
        input = begin + jnp.arange(width, dtype=jnp.int32)
        quarter = self.layout.split // 2
        byte = input // (4 * quarter) * quarter + input % quarter
        high = plgpu.load(view(self.refs["high"], self.columns, byte)).astype(jnp.int32)
        return (((high >> (input // quarter % 4 * 2)[None, :]) & 3) << 4).astype(jnp.float32)


def nibbles(packed: Array, half: int, less: int, interpret: bool) -> Array:
    """packed uint8 [R, C] -> its low or high four bits, minus `less`, in bfloat16 [R, C].

    As bfloat16 0x43 and a byte below 128 are 128 and more: so four bits are numbers after one subtraction.
    """
    if interpret:
        return ((packed >> jnp.uint8(4 * half) & jnp.uint8(15)).astype(jnp.int32) - less).astype(jnp.bfloat16)
    minus = (0x4300 + less) * 0x10001
    asm = f"""{{
        .reg .b32 four, two;
        shr.b32 four, $2, {4 * half};
        and.b32 four, four, 0x0F0F0F0F;
        prmt.b32 two, four, 0x43, 0x4140;
        sub.rn.bf16x2 $0, two, {minus:#x};
        prmt.b32 two, four, 0x43, 0x4342;
        sub.rn.bf16x2 $1, two, {minus:#x};
    }}"""
    out = jax.ShapeDtypeStruct(packed.shape, jnp.bfloat16)
    given = dict(args=[packed], constraints="=r,=r,r", pack=4, result_shape_dtypes=[out])
    return plgpu.elementwise_inline_asm(asm, **given)[0]


def e2m1(packed: Array, half: int) -> Array:
    """packed uint8 [R, C] -> its low or high four bits as E2M1 numbers, float32 [R, C] (OCP Microscaling 1.0, 5.3.3)."""
    bits = packed.astype(jnp.int32) >> (4 * half)
    exponent, mantissa = bits >> 1 & 3, bits & 1
    twice = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    return jnp.where(bits & 8 == 0, 0.5, -0.5) * twice.astype(jnp.float32)
