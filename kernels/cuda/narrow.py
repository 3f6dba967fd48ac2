"""Products of FP8 or int8 activations with weights as narrow, in Triton: one scale for some inputs of some outputs.

What a turn adds up is promoted to float32 and scaled there, as DeepSeek-V3 does it (arXiv 2412.19437, section 3.3):
within Hopper's FP8 instructions a sum has about 14 bits.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.activations import narrowed
from kernels.cuda.matrix import Groups, Program, Tile, launch_product, view


def narrow_product(
    x: Array,
    x_scales: Array | None,
    weight: Array,
    scales: Array,
    dtype: jnp.dtype,
    *,
    tile: Tile,
    groups: Groups | None = None,
    interpret: bool = False,
) -> Array:
    """x [M, K], weight [N, K] float8_e4m3fn or int8, scales [N / r, K / g] f32 -> [M, N] in `dtype`.

    x is as narrow as the weight, with x_scales [K / g, M] f32; or it is wide, x_scales is None, and each program makes
    it FP8 by groups of g inputs as it goes, which spares a few rows a kernel of their own. K is a whole number of
    turns, of tile.depth inputs, times splits. One of r and tile.columns divides the other, and so do tile.depth and g.
    groups: x's rows have outputs of their own, N of a weight [groups * N, K].
    """
    (M, K), N = x.shape, groups.outputs(weight) if groups else weight.shape[0]
    group, together = K // scales.shape[1], weight.shape[0] // scales.shape[0]
    depth = min(tile.depth, group)  # of one product
    parts = tile.depth // depth  # products of a turn
    turns = K // (depth * parts * tile.splits)
    assert turns * depth * parts * tile.splits == K and group % depth == 0, (K, group, tile)
    assert x_scales is not None or (depth == group and weight.dtype == jnp.float8_e4m3fn), (group, tile)

    def kernel(program: Program, x: Any, *refs: Any) -> None:
        *given, weight, scales, out = refs
        first = program.split * turns * parts

        def scales_of(part: Array) -> tuple[Array | None, Array]:
            """-> those of a product: of x if given, [rows], and of the weight, [] or [columns]."""
            index = jnp.minimum(part * depth // group, K // group - 1)
            row = jnp.minimum(program.rows, M - 1)
            of_x = plgpu.load(given[0].at[jnp.broadcast_to(index, row.shape), row]) if given else None
            if together % tile.columns == 0:
                block = scales.at[(program.first + program.column * tile.columns) // together, index]
                return of_x, plgpu.load(block).astype(jnp.float32)
            row = program.outputs // together
            return of_x, plgpu.load(scales.at[row, jnp.broadcast_to(index, row.shape)]).astype(jnp.float32)

        def multiply(part: Array, of_x: Array | None, of_weight: Array) -> Array:
            at = part * depth + jnp.arange(depth, dtype=jnp.int32)
            a = program.load_x(x, at)
            if of_x is None:
                a, of_x = narrowed(a)
            b = plgpu.load(view(weight, program.outputs, at))
            if of_weight.ndim == 0:
                factor = program.by_row(of_x * of_weight)
            else:
                factor = program.by_row(of_x) * program.by_column(of_weight)
            return program.dot(a, b).astype(jnp.float32) * factor

        def scales_of_turn(turn: Array) -> list[Any]:
            return [scales_of(first + turn * parts + part) for part in range(parts)]

        def turn(i: Array, carry: Any) -> Any:
            total, now = carry
            following = scales_of_turn(i + 1)  # a turn early: nothing waits for them
            for part in range(parts):
                total += multiply(first + i * parts + part, *now[part])
            return total, following

        start = jnp.zeros(tile.shape, jnp.float32), scales_of_turn(jnp.int32(0))
        total, _ = lax.fori_loop(0, program.turns(turns), turn, start)
        program.store(out, total)

    inputs = [x, *([] if x_scales is None else [x_scales]), weight, scales]
    return launch_product(kernel, inputs, (M, N), dtype, tile, interpret, groups)
