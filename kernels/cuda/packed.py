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

from kernels.cuda.matrix import Groups, Program, Tile, launch_product, view
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
    x: Array,
    weight: QuantizedTensor,
    dtype: jnp.dtype,
    *,
    tile: Tile,
    groups: Groups | None = None,
    interpret: bool = False,
) -> Array:
    """x [M, K], weight [N, K] -> [M, N] in `dtype`. A turn is tile.depth inputs of int8, twice `split` of others.

    groups: x's rows have outputs of their own, N of a weight [groups * N, K].
    """
    (M, K), layout = x.shape, weight.layout
    N = groups.outputs(weight.values) if groups else weight.values.shape[0]
    width = layout.split or min(tile.depth, K & -K)  # inputs of one product
    turns = K // (layout.packing * width * tile.splits)
    assert turns * layout.packing * width * tile.splits == K, (K, layout, tile)
    present = [name for name in ARRAYS if getattr(weight, name) is not None]

    def kernel(program: Program, x: Any, *refs: Any) -> None:
        *arrays, out = refs
        parts = Parts(layout, K, width, dict(zip(present, arrays, strict=True)), program.outputs, x.dtype, interpret)

        starts = [(program.split * turns * layout.packing + half) * width for half in range(layout.packing)]

        def shared(turn: Array) -> list[Any]:
            """-> for each half of a turn, what all its inputs share."""
            return [parts.shared(start + jnp.minimum(turn, turns - 1) * (layout.packing * width)) for start in starts]

        def multiply(turn: Array, carry: Any) -> Any:
            total, now = carry
            following = shared(turn + 1)  # a turn early: nothing waits for them
            at = (program.split * turns + turn) * width + jnp.arange(width, dtype=jnp.int32)
            values = plgpu.load(view(parts.refs["values"], program.outputs, at))
            for half, start in enumerate(starts):
                begin, (scale, zero) = start + turn * (layout.packing * width), now[half]
                a = program.load_x(x, begin + jnp.arange(width, dtype=jnp.int32))
                part = program.dot(a, parts.numbers(values, begin, half, zero))
                total += part if scale is None else part * program.by_column(scale)
            return total, following

        start = jnp.zeros(tile.shape, jnp.float32), shared(jnp.int32(0))
        total, _ = lax.fori_loop(0, program.turns(turns), multiply, start)
        program.store(out, total)

    inputs = [x, *(getattr(weight, name) for name in present)]
    return launch_product(kernel, inputs, (M, N), dtype, tile, interpret, groups)


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
        return self.group % self.width == 0 and "minima" not in self.refs

    def shared(self, begin: Array) -> tuple[Array | None, Array | None]:
        """-> the scale and the zero that the inputs from `begin` on share, [columns] float32, if there are any."""
        if not self.whole:
            return None, None
        return self.scale("scales", begin), self.entries("zeros", begin) if "zeros" in self.refs else None

    def numbers(self, values: Array, begin: Array, half: int, zero: Array | None) -> Array:
        """values [columns, width], of which half 0 or 1 holds the inputs from `begin` on -> the same in x's dtype."""
        layout, refs = self.layout, self.refs
        if layout.packing == 1:
            numbers = values
        elif layout.format == "mxfp4":
            numbers = e2m1(values, half, self.interpret)
        elif layout.format == "q6_k":
            numbers = nibbles(values, half, 32, self.interpret, *self.high_bits(begin))
        else:
            symmetric = layout.format == "int4" and "zeros" not in refs and "minima" not in refs
            numbers = nibbles(values, half, 8 if symmetric else 0, self.interpret)
        if self.whole:
            numbers = numbers.astype(self.dtype)
            return numbers if zero is None else numbers - zero[:, None].astype(self.dtype)
        numbers = numbers.astype(jnp.float32)
        if "zeros" in refs:
            numbers -= self.entries("zeros", begin)
        numbers *= self.scale("scales", begin)
        if "minima" in refs:
            minima = self.scale("minima", begin)
            numbers = numbers - minima if layout.format == "q4_k" else numbers + minima
        return numbers.astype(self.dtype)

    def row(self, name: str) -> Array:
        return lax.div(self.columns, jnp.int32(self.layout.rows)) if name == "scales" else self.columns

    def entries(self, name: str, begin: Array, group: int | None = None) -> Array:
        """-> an array's entries for the inputs from `begin` on, of which `group` share one: float32.

        [columns] for whole numbers, which have one for all `width` inputs, else [columns, width] or [columns, 1].
        """
        group = group or self.group
        row, first = self.row(name), lax.div(begin, jnp.int32(group))
        if group >= self.width:
            at = self.refs[name].at[row, jnp.broadcast_to(first, row.shape)]
        else:
            at = view(self.refs[name], row, first + jnp.arange(self.width // group, dtype=jnp.int32))
        entries = plgpu.load(at)
        if name == "scales" and self.layout.format == "mxfp4":
            entries = lax.bitcast_convert_type(entries.astype(jnp.int32) << 23, jnp.float32)  # 2 ** (entry - 127)
        entries = entries.astype(jnp.float32)
        if group >= self.width:
            return entries if self.whole else entries[:, None]
        return lax.broadcast_in_dim(entries, (*entries.shape, group), (0, 1)).reshape(entries.shape[0], self.width)

    def scale(self, name: str, begin: Array) -> Array:
        """As `entries`, times the entry of the superblock if the format has some."""
        entries = self.entries(name, begin)
        return entries * self.entries(f"super_{name}", begin, SUPER) if f"super_{name}" in self.refs else entries

    def high_bits(self, begin: Array) -> tuple[Array, Array]:
        """-> bytes that hold bits 4 and 5 of q6_k's inputs from `begin` on, and where: uint8, i32 [columns, width]."""
        quarter = self.layout.split // 2
        input = begin + jnp.arange(self.width, dtype=jnp.int32)
        byte = lax.div(input, 4 * quarter) * quarter + lax.rem(input, quarter)
        high = plgpu.load(view(self.refs["high"], self.columns, byte))
        return high, jnp.broadcast_to(lax.rem(lax.div(input, quarter), 4)[None, :] * 2, high.shape)


def nibbles(
    packed: Array, half: int, less: int, interpret: bool, high: Array | None = None, shift: Any = None
) -> Array:
    """packed uint8 [R, C] -> its low or high four bits, minus `less`, in bfloat16 [R, C].

    high uint8 [R, C]: two bits of it, from shift [R, C] i32 on, come above the four; neighbours have one shift.
    As bfloat16 0x43 and a byte below 128 are 128 and more: so bits are numbers after one subtraction.
    """
    if interpret:
        numbers = (packed >> jnp.uint8(4 * half) & jnp.uint8(15)).astype(jnp.int32)
        if high is not None:
            numbers |= (high.astype(jnp.int32) >> shift & 3) << 4
        return (numbers - less).astype(jnp.bfloat16)
    minus = (0x4300 + less) * 0x10001
    more = (
        ""
        if high is None
        else """
        shr.b32 two, $3, $4;
        and.b32 two, two, 0x03030303;
        shl.b32 two, two, 4;
        or.b32 bits, bits, two;"""
    )
    asm = f"""{{
        .reg .b32 bits, two, less;
        mov.b32 less, {minus:#x};
        shr.b32 bits, $2, {4 * half};
        and.b32 bits, bits, 0x0F0F0F0F;{more}
        prmt.b32 two, bits, 0x43, 0x4140;
        sub.rn.bf16x2 $0, two, less;
        prmt.b32 two, bits, 0x43, 0x4342;
        sub.rn.bf16x2 $1, two, less;
    }}"""
    given = [packed] if high is None else [packed, high, shift]
    return _pairs(asm, given, "r" if high is None else "r,r,r,r,r,r")


def e2m1(packed: Array, half: int, interpret: bool) -> Array:
    """packed uint8 [R, C] -> its low or high four bits as E2M1 numbers, bfloat16 (OCP Microscaling 1.0, 5.3.3).

    Exponent and mantissa at bfloat16's lowest bits of exponent are the number over 2 ** 126, subnormal ones included.
    """
    if interpret:
        bits = packed.astype(jnp.int32) >> (4 * half)
        exponent, mantissa = bits >> 1 & 3, bits & 1
        twice = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
        return (jnp.where(bits & 8 == 0, 0.5, -0.5) * twice.astype(jnp.float32)).astype(jnp.bfloat16)
    each = "".join(
        f"""
        prmt.b32 bits, four, 0, {selected};
        shl.b32 sign, bits, 12;
        and.b32 sign, sign, 0x80008000;
        shl.b32 bits, bits, 6;
        and.b32 bits, bits, 0x01C001C0;
        or.b32 bits, bits, sign;
        fma.rn.bf16x2 ${i}, bits, large, zero;"""
        for i, selected in enumerate(("0x4140", "0x4342"))
    )
    asm = f"""{{
        .reg .b32 four, bits, sign, large, zero;
        mov.b32 large, 0x7E807E80;
        mov.b32 zero, 0x80008000;
        shr.b32 four, $2, {4 * half};
        and.b32 four, four, 0x0F0F0F0F;{each}
    }}"""
    return _pairs(asm, [packed], "r")


def _pairs(asm: str, inputs: list[Any], constraints: str) -> Array:
    """-> bfloat16 numbers like inputs[0], by PTX that makes two words of four of them."""
    out = [jax.ShapeDtypeStruct(inputs[0].shape, jnp.bfloat16)]
    constraints = f"=&r,=&r,{constraints}"
    return plgpu.elementwise_inline_asm(asm, args=inputs, constraints=constraints, pack=4, result_shape_dtypes=out)[0]
