"""Products of wide activations with weights of 4, 6 or 8 bits that are unpacked in registers, in Triton.

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
    group = weight.inputs // groups
    if groups > 1 and group & (group - 1):
        return f"no groups of {group} inputs: powers of two only"
    if layout.packing == 1 and (weight.inputs & -weight.inputs) < LEAST:
        return f"no {weight.inputs} inputs: multiples of {LEAST} only"
    return None


def packed_product(
    x: Array, weight: QuantizedTensor, dtype: jnp.dtype, *, tile: Tile, interpret: bool = False
) -> Array:
    """x [M, K], weight [N, K] -> [M, N] in `dtype`. A turn is tile.depth inputs of int8, twice `split` of others."""
    (M, K), layout = x.shape, weight.layout
    N = weight.values.shape[0]
    width = layout.split or min(tile.depth, K & -K)  # inputs of one product
    turns = K // (layout.packing * width * tile.splits)
    assert turns * layout.packing * width * tile.splits == K, (K, layout, tile)
    present = [name for name in ARRAYS if getattr(weight, name) is not None]

    def kernel(x: Any, *refs: Any) -> None:
        *arrays, out = refs
        program = Program.here(tile, M, N)
        parts = Parts(layout, K, width, dict(zip(present, arrays, strict=True)), program.columns, x.dtype, interpret)

        starts = [(program.split * turns * layout.packing + half) * width for half in range(layout.packing)]

        def shared(i: Array) -> list[Any]:
            """-> for each half of a turn, its scales and zeros if all its inputs share them."""
            return [parts.shared(start + jnp.minimum(i, turns - 1) * (layout.packing * width)) for start in starts]

        def turn(i: Array, carry: Any) -> Any:
            total, now = carry
            following = shared(i + 1)  # a turn early: nothing waits for them
            at = (program.split * turns + i) * width + jnp.arange(width, dtype=jnp.int32)
            values = plgpu.load(view(parts.refs["values"], program.columns, at))
            for half, start in enumerate(starts):
                begin = start + i * (layout.packing * width)
                a = program.load_x(x, begin + jnp.arange(width, dtype=jnp.int32))
                part = program.dot(a, parts.numbers(values, begin, half, now[half]))
                total += part * program.by_column(now[half][0]) if parts.whole else part
            return total, following

        total, _ = lax.fori_loop(0, turns, turn, (jnp.zeros(tile.shape, jnp.float32), shared(jnp.int32(0))))
        program.store(out, total, N)

    inputs = [x, *(getattr(weight, name) for name in present)]
    return launch_product(kernel, inputs, (M, N), dtype, tile, interpret)


class Parts(NamedTuple):
    """A weight as a program sees it: references to its arrays, and the columns that are the program's."""

    layout: Layout
    inputs: int
    width: int  # inputs that are multiplied at a time
    refs: dict[str, Any]
    columns: Array
    dtype: Any
    interpret: bool

    @property
    def group(self) -> int:
        return self.inputs // self.refs["scales"].shape[1]

    @property
    def whole(self) -> bool:
        """Whether numbers are whole ones, whose products are to be scaled."""
        plain = self.layout.format in ("int8", "fp8", "int4") and "minima" not in self.refs
        return plain and self.group % self.width == 0

    def shared(self, begin: Array) -> tuple[Array, ...]:
        """-> scales, and zeros if there are any, that the inputs from `begin` on share: [columns] float32."""
        return tuple(
            self.each(name, begin, self.group) for name in ("scales", "zeros") if name in self.refs and self.whole
        )

    def numbers(self, values: Array, begin: Array, half: int, shared: tuple[Array, ...]) -> Array:
        """values [columns, width], of which half 0 or 1 holds the inputs from `begin` on -> the same in x's dtype."""
        layout, refs = self.layout, self.refs
        if layout.packing == 1:
            numbers = values
        elif layout.format == "mxfp4":
            numbers = e2m1(values, half)
        else:
            symmetric = layout.format == "int4" and "zeros" not in refs and "minima" not in refs
            numbers = nibbles(values, half, 8 if symmetric else 0, self.interpret)
        if self.whole:
            numbers = numbers.astype(self.dtype)
            return numbers - shared[1][:, None].astype(self.dtype) if len(shared) > 1 else numbers
        numbers = numbers.astype(jnp.float32)
        if layout.format == "q6_k":
            numbers += self.high_bits(begin) - 32.0
        if "zeros" in refs:
            numbers -= self.spread("zeros", begin, self.group)
        numbers *= self.scale("scales", "super_scales", begin)
        if "minima" in refs:
            minima = self.scale("minima", "super_minima", begin)
            numbers = numbers - minima if layout.format == "q4_k" else numbers + minima
        return numbers.astype(self.dtype)

    def row(self, name: str) -> Array:
        return self.columns // self.layout.rows if name == "scales" else self.columns

    def each(self, name: str, begin: Array, group: int) -> Array:
        """-> the entry of an array's that covers the input `begin`: [columns] float32."""
        row = self.row(name)
        return plgpu.load(self.refs[name].at[row, jnp.broadcast_to(begin // group, row.shape)]).astype(jnp.float32)

    def spread(self, name: str, begin: Array, group: int) -> Array:
        """-> an array's entries for the inputs from `begin` on: [columns, width or 1] float32."""
        if group % self.width == 0:
            return self.each(name, begin, group)[:, None]
        index = begin // group + jnp.arange(self.width // group, dtype=jnp.int32)
        entries = plgpu.load(view(self.refs[name], self.row(name), index))
        if name == "scales" and self.layout.format == "mxfp4":
            entries = lax.bitcast_convert_type(entries.astype(jnp.int32) << 23, jnp.float32)  # 2 ** (entry - 127)
        shape = (*entries.shape, group)
        return lax.broadcast_in_dim(entries.astype(jnp.float32), shape, (0, 1)).reshape(entries.shape[0], self.width)

    def scale(self, name: str, over: str, begin: Array) -> Array:
        """As `spread`, times the entry of the superblock if the format has some."""
        entries = self.spread(name, begin, self.group)
        return entries * self.each(over, begin, SUPER)[:, None] if over in self.refs else entries

    def high_bits(self, begin: Array) -> Array:
        """-> 16 times bits 4 and 5 of q6_k's inputs from `begin` on: [columns, width] float32."""
        input = begin + jnp.arange(self.width, dtype=jnp.int32)
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
        .reg .b32 four, two, less;
        mov.b32 less, {minus:#x};
        shr.b32 four, $2, {4 * half};
        and.b32 four, four, 0x0F0F0F0F;
        prmt.b32 two, four, 0x43, 0x4140;
        sub.rn.bf16x2 $0, two, less;
        prmt.b32 two, four, 0x43, 0x4342;
        sub.rn.bf16x2 $1, two, less;
    }}"""
    out = jax.ShapeDtypeStruct(packed.shape, jnp.bfloat16)
    inputs, outputs = [packed], [out]
    return plgpu.elementwise_inline_asm(asm, args=inputs, constraints="=r,=r,r", pack=4, result_shape_dtypes=outputs)[0]


def e2m1(packed: Array, half: int) -> Array:
    """packed uint8 [R, C] -> its low or high four bits as E2M1 numbers, float32 (OCP Microscaling 1.0, 5.3.3)."""
    bits = packed.astype(jnp.int32) >> (4 * half)
    exponent, mantissa = bits >> 1 & 3, bits & 1
    twice = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    return jnp.where(bits & 8 == 0, 0.5, -0.5) * twice.astype(jnp.float32)
