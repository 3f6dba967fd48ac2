"""Weights of 8 or 4 bits become bfloat16 in registers, as a product takes them from there, in Mosaic's own terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

SMALL = 2.0**13  # numbers are smaller by that in bfloat16, so that what they are made with is in its range
WGMMA = plgpu.Layout.WGMMA


class Part(NamedTuple):
    """How numbers of a format are taken from their bytes: as bfloat16 numbers (byte ^ flip & mask) * unit + middle.

    A byte under another of zeros is a bfloat16 number, byte * 2 ** -133, though a subnormal one.
    """

    flip: int
    mask: int
    unit: float
    middle: float


def part_of(packing: int, half: int) -> Part:
    """-> how the low or the high half of bytes is taken, or all of them, as whole numbers over SMALL."""
    if packing == 1:
        return Part(0x80, 0xFF, 2.0**133 / SMALL, -128 / SMALL)
    return (Part(0, 0x0F, 2.0**133 / SMALL, -8 / SMALL), Part(0, 0xF0, 2.0**129 / SMALL, -8 / SMALL))[half]


def unpack(raw: Array, part: Part, scales: Sequence[Array] = (), zeros: Sequence[Array] = ()) -> Array:
    """raw int8 or uint8 [N, C] as wgmma takes them -> their numbers over SMALL, in bfloat16.

    scales [N] float32 of each group of inputs, and zeros that take the place of the format's middle; without any,
    numbers stay whole ones. One instruction multiplies and adds, and rounds once; zeros are taken off before.
    """
    count = len(scales)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, *[WGMMA.reduce(1)] * (count + len(zeros))),
        return_type=plgpu.ShapeDtypeStruct(raw.shape, jnp.bfloat16, layout=WGMMA),
    )
    def run(_: Any, raw: Any, *entries: Any) -> Any:
        i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())

        def asm(text: str, *inputs: Any, kind: str = "r") -> Any:
            return llvm.inline_asm(i32, list(inputs), text, ",".join(["=r", *kind * len(inputs)]))

        def twice(number: float) -> Any:
            return arith.constant(i32, int(np.asarray(number, jnp.bfloat16).view(np.uint16)) * 0x10001)

        def times(a: Any, b: Any) -> Any:
            return asm("mul.rn.bf16x2 $0, $1, $2;", a, b)

        def entry(index: int, row: int) -> Any:
            """-> a float32 of a thread's rows, twice in bfloat16."""
            number = vector.extract(entries[index].registers.flat[row], [], [0])
            return asm("cvt.rn.bf16x2.f32 $0, $1, $1;", number, kind="f")

        def factors(index: int, row: int) -> list[Any]:
            """-> what numbers are multiplied with, what is added then, and what they are multiplied with then."""
            unit, middle = twice(part.unit), twice(part.middle)
            if not count:
                return [unit, middle]
            scale = entry(index, row)
            if zeros:
                return [unit, times(entry(count + index, row), twice(-1 / SMALL)), scale]
            return [times(scale, unit), times(scale, middle)]

        each = [[factors(index, row) for row in range(raw.shape[0] // 32)] for index in range(max(count, 1))]
        numbers = np.empty_like(raw.registers)
        for place, register in np.ndenumerate(raw.registers):  # a pair of neighbours
            number = asm("prmt.b32 $0, $1, 0, 0x4140;", arith.extui(i32, mgpu.utils.bitcast(register, i16)))
            if part.flip:
                number = asm(f"xor.b32 $0, $1, {part.flip * 0x10001:#x};", number)
            if part.mask != 0xFF:
                number = asm(f"and.b32 $0, $1, {part.mask * 0x10001:#x};", number)
            by, plus, *then = each[place[1] * len(each) // raw.registers.shape[1]][2 * place[0] + place[4]]
            number = asm("fma.rn.bf16x2 $0, $1, $2, $3;", number, by, plus)
            for factor in then:
                number = times(number, factor)
            numbers[place] = mgpu.utils.bitcast(number, pair)
        return mgpu.FragmentedArray(_registers=numbers, _layout=raw.layout, _is_signed=None)

    return run(raw, *scales, *zeros)
