"""Products of FP8 activations with FP8 weights in blocks, for many tokens on Hopper GPUs, in Pallas-Mosaic-GPU.

A program per multiprocessor takes tile after tile. One warpgroup copies inputs to shared memory, as far ahead as stages
are free; two multiply, and while one adds its product of 128 inputs to float32 sums, scaled, the other's runs
(DeepSeek-V3, arXiv 2412.19437, section 3.3).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

JAX = (0, 11)  # whose Mosaic this is written for
BLOCK = 128  # inputs and outputs of a weight's scale
ROWS = 64  # of what a warpgroup multiplies: what its instruction takes
GROUPS = 2  # warpgroups that multiply; the next one fetches
BAND = 32  # tiles of rows that are taken together: the tokens that stay in the second-level cache
REGISTERS = (232, 40)  # of a thread that multiplies, and of one that fetches


class Plan(NamedTuple):
    """What a kernel is compiled for: a program's tile is rows x columns, 128 x 128 or 64 x 256."""

    rows: int
    stages: int
    programs: int

    @property
    def columns(self) -> int:
        return GROUPS * ROWS * BLOCK // self.rows


class Shared(NamedTuple):
    """What the warpgroups share: tiles, and a barrier for each that says that it has come, and that it may go."""

    x: Any  # [stages, rows, BLOCK]
    scales: Any  # [stages, rows]
    weight: Any  # [stages, columns, BLOCK]
    out: Any  # [GROUPS, ROWS, BLOCK]
    ready: Any
    free: Any


def supports(N: int, K: int, rows: int = 128) -> bool:
    """-> whether the kernel takes a product of this shape, on a device and JAX that have it."""
    return N % (GROUPS * ROWS * BLOCK // rows) == 0 and K % BLOCK == 0 and jax.__version_info__[:2] == JAX


# Compiled by itself, it is traced and lowered once for all layers of a step.
@partial(jax.jit, static_argnames=("dtype", "rows", "stages", "multiprocessors"))
def block_product(
    x: Array,
    x_scales: Array,
    weight: Array,
    scales: Array,
    dtype: Any = jnp.bfloat16,
    *,
    rows: int = 128,
    stages: int = 5,
    multiprocessors: int,
) -> Array:
    """x [M, K] float8_e4m3fn, x_scales [K / 128, M] f32, weight [N, K], scales [N / 128, K / 128] f32 -> [M, N]."""
    (tokens, K), N = x.shape, weight.shape[0]
    x, x_scales = jnp.pad(x, ((0, -tokens % rows), (0, 0))), jnp.pad(x_scales, ((0, 0), (0, -tokens % rows)))
    M = x.shape[0]
    plan = Plan(rows, stages, multiprocessors)
    down, across, turns = M // rows, N // plan.columns, K // BLOCK
    band = next(size for size in range(min(BAND, down), 0, -1) if down % size == 0)
    tiles = down * across
    plan = plan._replace(programs=min(multiprocessors, tiles))

    def kernel(x: Any, x_scales: Any, weight: Any, scales: Any, out: Any, *scratch: Any) -> None:
        shared = Shared(*scratch)
        program, group = lax.axis_index("program"), lax.axis_index("group")

        def for_each_tile(do: Any) -> None:
            """do(row, column, step) for each of a program's tiles; `step` counts turns from its start on."""

            def one(i: Any, _: Any) -> None:
                place = i * plan.programs + program
                inside = place % (band * across)
                row = place // (band * across) * band + inside % band
                do(row * rows, inside // band * plan.columns, i * turns)

            mine = tiles // plan.programs + (program < tiles % plan.programs).astype(jnp.int32)
            lax.fori_loop(0, mine, one, None)

        @pl.when(group == GROUPS)
        def _fetch() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

            def fetch(row: Any, column: Any, step: Any) -> None:
                def turn(k: Any, _: Any) -> None:
                    slot = (step + k) % stages
                    at = pl.ds(k * BLOCK, BLOCK)
                    ready = shared.ready.at[slot]
                    plgpu.barrier_wait(shared.free.at[slot])
                    plgpu.copy_gmem_to_smem(x_scales.at[k, pl.ds(row, rows)], shared.scales.at[slot], ready)
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, rows), at], shared.x.at[slot], ready)
                    plgpu.copy_gmem_to_smem(weight.at[pl.ds(column, plan.columns), at], shared.weight.at[slot], ready)

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
            across_at = 0 if rows > ROWS else group * BLOCK
            by_row = plgpu.Layout.WGMMA.reduce(1)

            def multiply(row: Any, column: Any, step: Any) -> None:
                block = (column + across_at) // BLOCK

                def turn(k: Any, carry: Any) -> Any:
                    total, scale = carry
                    following = scales[block, jnp.minimum(k + 1, turns - 1)]  # a turn early: nothing waits for it
                    slot = (step + k) % stages
                    plgpu.barrier_wait(shared.ready.at[slot])

                    def part_of(ref: Any) -> Array:
                        some = shared.weight.at[slot, pl.ds(across_at, BLOCK)]
                        plgpu.wgmma(ref, shared.x.at[slot, pl.ds(down_at, ROWS)], some.transpose((1, 0)))
                        return ref[...]

                    token = plgpu.load(shared.scales.at[slot, pl.ds(down_at, ROWS)], (), layout=by_row) * scale
                    part = pl.run_scoped(part_of, plgpu.WGMMAAccumulatorRef((ROWS, BLOCK), jnp.float32))
                    plgpu.barrier_arrive(shared.free.at[slot])
                    return total + part * lax.broadcast_in_dim(token, (ROWS, BLOCK), (0,)), following

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), jnp.float32), plgpu.Layout.WGMMA)
                total, _ = lax.fori_loop(0, turns, turn, (zeros, scales[block, 0]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                shared.out[group] = total.astype(dtype)
                plgpu.commit_smem()
                target = out.at[pl.ds(row + down_at, ROWS), pl.ds(column + across_at, BLOCK)]
                plgpu.copy_smem_to_gmem(shared.out.at[group], target)

            for_each_tile(multiply)
            plgpu.wait_smem_to_gmem(0)

    def tile(shape: tuple[int, ...], dtype: Any, width: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=[
            tile((stages, rows, BLOCK), x.dtype, 128),
            plgpu.SMEM((stages, rows), jnp.float32),
            tile((stages, plan.columns, BLOCK), x.dtype, 128),
            tile((GROUPS, ROWS, BLOCK), dtype, 64),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # nobody reads what it wrote to shared memory
        ),
    )
    return run(x, x_scales, weight, scales)[:tokens]
