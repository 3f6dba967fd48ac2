"""Products of FP8 activations with FP8 weights in blocks, for many tokens on Hopper GPUs, in Pallas-Mosaic-GPU.

A program per multiprocessor takes tile after tile. One warpgroup copies inputs to shared memory, as far ahead as stages
are free; two multiply, and while one adds its product of 128 inputs to float32 sums, scaled, the other's runs
(DeepSeek-V3, arXiv 2412.19437, section 3.3). Where a product has fewer tiles than the GPU has multiprocessors, programs
share the inputs of a tile, and XLA adds up what they found.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.cuda.matrix import Tile, summed
from kernels.cuda.mosaic import ROOM, for_each, load, why_not_this_jax

BLOCK = 128  # inputs and outputs of a weight's scale
ROWS = 64  # of what a warpgroup multiplies: what its instruction takes
TILES = ((128, 128), (64, 256), (64, 128))  # rows and columns of a program's
GROUPS = 2  # warpgroups that multiply; the next one fetches
ALIGNED = 8  # rows that copies move together: tokens are padded to as many, and those past the end read as zeros
BAND = 32  # tiles of rows that are taken together: the tokens that stay in the second-level cache
MULTIPROCESSORS = 132  # of an H100 or H200
LEAST_INPUTS = 4 * BLOCK  # of a program
REGISTERS = (232, 40)  # of a thread that multiplies, and of one that fetches


class Shared(NamedTuple):
    """What the warpgroups share: tiles, and a barrier for each that says that it has come, and that it may go."""

    x: Any  # [stages, rows, BLOCK]
    scales: Any  # [stages, rows]
    weight: Any  # [stages, columns, BLOCK]
    out: Any  # [GROUPS, *part]
    ready: Any
    free: Any


def supports(N: int, K: int, tile: Tile) -> bool:
    """-> whether the kernel takes a product of this shape in such tiles, on a device and JAX that have it."""
    whole = N % tile.columns == 0 and K % (BLOCK * tile.splits) == 0
    stage = (tile.rows + tile.columns) * BLOCK + tile.rows * 4
    out = tile.rows * tile.columns * (2 if tile.splits == 1 else 4)
    fits = tile.stages * stage + out <= ROOM
    return whole and fits and (tile.rows, tile.columns) in TILES and why_not_this_jax() is None


def default_tile(M: int, N: int, K: int) -> Tile:
    """-> what serves M tokens and a weight [N, K]."""
    if M > 256:
        return filling(128, 128, M, N, K)
    return filling(ROWS, 128 if M <= ROWS and N <= ROWS * MULTIPROCESSORS else 256, M, N, K)


def filling(rows: int, columns: int, M: int, N: int, K: int) -> Tile:
    """-> tiles of this size, or as many parts of their inputs as fill the GPU once."""
    tiles = pl.cdiv(M, rows) * pl.cdiv(N, columns)
    splits = next((n for n in (8, 4, 2) if n * tiles <= MULTIPROCESSORS and K % (n * LEAST_INPUTS) == 0), 1)
    return Tile(rows, columns, BLOCK, splits, stages=4)


# Compiled by itself, it is traced and lowered once for all layers of a step.
@partial(jax.jit, static_argnames=("dtype", "tile", "multiprocessors"))
def block_product(
    x: Array,
    x_scales: Array,
    weight: Array,
    scales: Array,
    dtype: Any = jnp.bfloat16,
    *,
    tile: Tile,
    multiprocessors: int,
) -> Array:
    """x [M, K] float8_e4m3fn, x_scales [K / 128, M] f32, weight [N, K], scales [N / 128, K / 128] f32 -> [M, N]."""
    (tokens, K), N = x.shape, weight.shape[0]
    rows, columns, splits, stages = tile.rows, tile.columns, tile.splits, tile.stages
    M = tokens + -tokens % ALIGNED
    x, x_scales = jnp.pad(x, ((0, M - tokens), (0, 0))), jnp.pad(x_scales, ((0, 0), (0, M - tokens)))
    down, across, turns = pl.cdiv(M, rows), N // columns, K // BLOCK // splits
    band = next(size for size in range(min(BAND, down), 0, -1) if down % size == 0)
    tiles = down * across
    programs = min(multiprocessors, tiles * splits)
    part = (ROWS, columns if rows > ROWS else columns // GROUPS)  # of a tile: what a warpgroup multiplies
    wide = dtype if splits == 1 else jnp.float32

    def kernel(x: Any, x_scales: Any, weight: Any, scales: Any, out: Any, *scratch: Any) -> None:
        shared = Shared(*scratch)
        program, group = lax.axis_index("program"), lax.axis_index("group")

        def for_each_tile(do: Any) -> None:
            """do(row, column, split, step) for each of a program's tiles; `step` counts turns from its start on."""

            def one(at: Any, i: Any) -> None:
                place = lax.rem(at, tiles)
                outer, inside = lax.div(place, band * across), lax.rem(place, band * across)
                row, column = outer * band + lax.rem(inside, band), lax.div(inside, band)
                do(row * rows, column * columns, lax.div(at, tiles), i * turns)

            for_each(tiles * splits, programs, program, one)

        @pl.when(group == GROUPS)
        def _fetch() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

            def fetch(row: Any, column: Any, split: Any, step: Any) -> None:
                def turn(i: Any, _: Any) -> None:
                    slot, k = lax.rem(step + i, stages), split * turns + i
                    at = pl.ds(k * BLOCK, BLOCK)
                    ready = shared.ready.at[slot]
                    plgpu.barrier_wait(shared.free.at[slot])
                    plgpu.copy_gmem_to_smem(x_scales.at[k, pl.ds(row, rows)], shared.scales.at[slot], ready)
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, rows), at], shared.x.at[slot], ready)
                    plgpu.copy_gmem_to_smem(weight.at[pl.ds(column, columns), at], shared.weight.at[slot], ready)

                lax.fori_loop(0, turns, turn, None)

            for_each_tile(fetch)
            for slot in range(stages):
                plgpu.barrier_wait(shared.free.at[slot])

        @pl.when(group < GROUPS)
        def _multiply() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(shared.free.at[slot])
            down_at = group * ROWS if rows > ROWS else 0
            across_at = 0 if rows > ROWS else group * part[1]
            by_row = plgpu.Layout.WGMMA.reduce(1)

            def multiply(row: Any, column: Any, split: Any, step: Any) -> None:
                block, first = lax.div(column + across_at, BLOCK), split * turns

                def turn(i: Any, carry: Any) -> Any:
                    total, scale = carry
                    following = scales[block, first + jnp.minimum(i + 1, turns - 1)]  # a turn early: no wait for it
                    slot = lax.rem(step + i, stages)
                    plgpu.barrier_wait(shared.ready.at[slot])

                    def part_of(ref: Any) -> Array:
                        some = shared.weight.at[slot, pl.ds(across_at, part[1])]
                        plgpu.wgmma(ref, shared.x.at[slot, pl.ds(down_at, ROWS)], some.transpose((1, 0)))
                        return ref[...]

                    token = load(shared.scales.at[slot, pl.ds(down_at, ROWS)], layout=by_row) * scale
                    product = pl.run_scoped(part_of, plgpu.WGMMAAccumulatorRef(part, jnp.float32))
                    plgpu.barrier_arrive(shared.free.at[slot])
                    return total + product * lax.broadcast_in_dim(token, part, (0,)), following

                zeros = plgpu.layout_cast(jnp.zeros(part, jnp.float32), plgpu.Layout.WGMMA)
                total, _ = lax.fori_loop(0, turns, turn, (zeros, scales[block, first]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                shared.out[group] = total.astype(wide)
                plgpu.commit_smem()
                target = out.at[split, pl.ds(row + down_at, ROWS), pl.ds(column + across_at, part[1])]
                plgpu.copy_smem_to_gmem(shared.out.at[group], target)

            for_each_tile(multiply)
            plgpu.wait_smem_to_gmem(0)

    def tiled(shape: tuple[int, ...], dtype: Any, width: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((splits, M, N), wide),
        grid=(programs,),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=[
            tiled((stages, rows, BLOCK), x.dtype, 128),
            plgpu.SMEM((stages, rows), jnp.float32),
            tiled((stages, columns, BLOCK), x.dtype, 128),
            tiled((GROUPS, *part), wide, 128 // jnp.dtype(wide).itemsize),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # nobody reads what it wrote to shared memory
        ),
    )
    return summed(run(x, x_scales, weight, scales), dtype)[:tokens]
