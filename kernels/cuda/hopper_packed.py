"""Products of wide activations with weights of 8 or 4 bits on Hopper GPUs, in Pallas-Mosaic-GPU.

The weight comes first in the product: the tensor cores take 64 outputs of it from registers, where its numbers became
bfloat16, and the tokens, however few, from shared memory. A program per multiprocessor takes tile after tile. One
warpgroup copies inputs to shared memory, as far ahead as stages are free; the others unpack and multiply.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.cuda.hopper_unpack import SMALL, part_of, unpack
from kernels.cuda.matrix import FEW_OUTPUTS, Tile, summed
from kernels.cuda.mosaic import ROOM, for_each, load, why_not_this_jax
from kernels.quantized import QuantizedTensor

DEPTH = 128  # bytes of each output's weights that a turn takes, whose halves, if they have two, are as many neighbours
CHUNK = 64  # inputs that are multiplied at a time, while the next are unpacked
PIECE = 32  # tokens whose results are written at a time
OUTPUTS = 64  # of what a warpgroup multiplies: what its instruction takes
LEAST_GROUP = 32  # inputs that share a scale
LEAST_ROWS = 8
ROWS = (8, 16, 32, 64, 128)  # tokens of a tile
WIDTHS = ((128, 8), (256, 8), (256, 16))  # outputs of a tile, and its warps that multiply
SPLITS = (1, 2, 4, 8)
STAGES = (6, 4, 3, 2)
FEW_ROWS = 32  # tokens that are read beside a weight without much ado
REGISTERS = {2: (232, 40), 4: (112, 24)}  # by how many warpgroups multiply: of a thread that does, and not
WGMMA = plgpu.Layout.WGMMA


class Shared(NamedTuple):
    """What the warpgroups share: tiles, and a barrier for each that says that it has come, and that it may go."""

    x: Any  # [stages, rows, inputs of a turn]
    weight: Any  # [stages, columns, DEPTH]
    out: Any  # [groups, tokens, outputs of a warpgroup]
    ready: Any
    free: Any


def supports(weight: QuantizedTensor) -> str | None:
    """-> None, or why the kernel cannot multiply a weight [N, K], on a device that has it."""
    layout, K = weight.layout, weight.inputs
    groups = weight.scales.shape[1]
    if why := why_not_this_jax():
        return why
    if layout.activations != "none" or layout.format not in ("int8", "int4"):
        return f"no {layout.format} with activations {layout.activations!r}"
    if weight.minima is not None:
        return "no minima"
    if layout.packing == 2 and layout.split != DEPTH:
        return f"no runs of {layout.split} bytes: {DEPTH} only"
    if K % (DEPTH * layout.packing) or weight.values.shape[0] % OUTPUTS:
        return f"no weight {weight.values.shape[0]} x {K}"
    group = K // groups
    if groups > 1 and (group < LEAST_GROUP or group & (group - 1)):
        return f"no groups of {group} inputs"
    return None


def fits(weight: QuantizedTensor, tile: Tile) -> bool:
    """-> whether a tile cuts a weight that the kernel supports into whole parts that have room."""
    N, width = weight.values.shape
    groups = tile.warps // 4
    stage = DEPTH * (tile.columns + 2 * tile.rows * weight.layout.packing)
    room = tile.stages * stage + 4 * min(tile.rows, PIECE) * tile.columns <= ROOM
    known = tile.rows in ROWS and tile.depth == DEPTH and tile.splits in SPLITS and groups in REGISTERS
    whole = N % tile.columns == 0 and (width // DEPTH) % tile.splits == 0
    return room and known and whole and tile.columns % (groups * OUTPUTS) == 0


def takes(x: Array, weight: QuantizedTensor, tile: Tile) -> bool:
    """-> whether a product may be computed with a tile, whatever a file says."""
    return x.dtype == jnp.bfloat16 and supports(weight) is None and fits(weight, tile)


def tiles_of(weight: QuantizedTensor, M: int) -> list[Tile]:
    """-> a tile for M tokens of every width that fits, with most stages; few outputs are split over their inputs."""
    rows = next((rows for rows in ROWS if rows >= M), ROWS[-1])
    splits = SPLITS if weight.values.shape[0] > FEW_OUTPUTS else (4, 2, 1)
    found = []
    for columns, warps in WIDTHS:
        tiles = [Tile(rows, columns, DEPTH, split, warps, stages) for split in splits for stages in STAGES]
        found += [tile for tile in tiles if fits(weight, tile)][:1]
    return found


def default_tile(weight: QuantizedTensor, M: int) -> Tile | None:
    """-> a tile for M tokens where nothing was tuned, if one fits.

    Many tokens, which every program reads, are shared by more outputs if there are enough of those; int4's numbers
    need the registers of fewer warps.
    """
    wide = M > FEW_ROWS and weight.values.shape[0] > FEW_OUTPUTS
    wanted = (256, 16 // weight.layout.packing) if wide else (128, 8)
    found = tiles_of(weight, M)
    return next((tile for tile in found if (tile.columns, tile.warps) == wanted), next(iter(found), None))


def packed_product(x: Array, weight: QuantizedTensor, dtype: jnp.dtype, *, tile: Tile, multiprocessors: int) -> Array:
    """x [M, K] bfloat16, weight [N, K] -> [M, N] in `dtype`, by programs of tile.columns outputs and tile.rows tokens.

    Of splits, which share a sum over the inputs, XLA adds the sums. A program's warpgroups share its outputs.
    """
    tokens = x.shape[0]
    if tokens > LEAST_ROWS:  # fewer are padded as they are copied
        x = jnp.pad(x, ((0, -tokens % LEAST_ROWS), (0, 0)))
    y = _parts(
        x, weight.values, weight.scales, weight.zeros, weight.layout.packing,
        jnp.dtype(dtype) if tile.splits == 1 else jnp.dtype(jnp.float32), tile, multiprocessors,
    )  # fmt: skip
    return summed(y, dtype)[:tokens]


# Compiled by itself, it is traced and lowered once for all layers of a step.
@partial(jax.jit, static_argnames=("packing", "dtype", "tile", "multiprocessors"))
def _parts(
    x: Array, values: Array, scales: Array, zeros: Array | None, packing: int, dtype: jnp.dtype, tile: Tile,
    multiprocessors: int,
) -> Array:  # fmt: skip
    """-> [splits, M, N]."""
    (M, K), N = x.shape, values.shape[0]
    rows, columns, stages = tile.rows, tile.columns, tile.stages
    groups, group = tile.warps // 4, K // scales.shape[1]
    own = columns // groups  # outputs of a warpgroup
    whole = group == K  # an output's sum is multiplied with its scale
    depth = DEPTH * packing
    turns = K // depth // tile.splits
    down, across = pl.cdiv(M, rows), N // columns
    items = down * across * tile.splits
    programs = min(multiprocessors, items)
    piece = min(rows, PIECE)

    def kernel(x: Any, values: Any, scales: Any, *refs: Any) -> None:
        entries, (out, *scratch) = [scales, *refs[: zeros is not None]], refs[zeros is not None :]
        shared = Shared(*scratch)
        program, member = lax.axis_index("program"), lax.axis_index("group")

        def for_each_item(do: Any) -> None:
            """do(split, row, column, step) for each of a program's tiles; `step` counts turns from its start on."""

            def one(place: Any, i: Any) -> None:
                split, inside = lax.div(place, down * across), lax.rem(place, down * across)
                do(split, lax.rem(inside, down) * rows, lax.div(inside, down) * columns, i * turns)

            for_each(items, programs, program, one)

        @pl.when(member == groups)
        def _fetch() -> None:
            plgpu.set_max_registers(REGISTERS[groups][1], action="decrease")

            def fetch(split: Any, row: Any, column: Any, step: Any) -> None:
                def turn(k: Any, _: Any) -> None:
                    slot, place = lax.rem(step + k, stages), split * turns + k
                    ready = shared.ready.at[slot]
                    plgpu.barrier_wait(shared.free.at[slot])
                    some = values.at[pl.ds(column, columns), pl.ds(place * DEPTH, DEPTH)]
                    plgpu.copy_gmem_to_smem(some, shared.weight.at[slot], ready)
                    some = x.at[pl.ds(row, rows), pl.ds(place * depth, depth)]
                    plgpu.copy_gmem_to_smem(some, shared.x.at[slot], ready)

                lax.fori_loop(0, turns, turn, None)

            for_each_item(fetch)
            for slot in range(stages):
                plgpu.barrier_wait(shared.free.at[slot])

        @pl.when(member < groups)
        def _multiply() -> None:
            plgpu.set_max_registers(REGISTERS[groups][0], action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(shared.free.at[slot])
            mine = member * own

            def multiply(split: Any, row: Any, column: Any, step: Any) -> None:
                outputs = pl.ds(column + mine, own)

                def column_of(ref: Any, i: Any) -> Array:
                    """ref [N, groups] -> what the outputs have in column i, float32."""
                    column = load(ref.at[outputs, i], layout=WGMMA.reduce(1), optimized=False)
                    return column.astype(jnp.float32)

                def of_groups(k: Any) -> list[list[list[Array]]]:
                    """-> of each half of a turn's bytes its groups' scales, and their zeros if there are any."""
                    if whole:
                        return [[]] * packing
                    first = (split * turns + jnp.minimum(k, turns - 1)) * depth
                    starts = [[first + half * DEPTH + i for i in range(0, DEPTH, group)] for half in range(packing)]
                    at = [[lax.div(start, group) for start in of_half] for of_half in starts]
                    return [[[column_of(ref, i) for i in columns] for ref in entries] for columns in at]

                def turn(k: Any, now: Any, total: Any) -> Any:
                    following = of_groups(k + 1)  # a turn early: nothing waits for them
                    slot = lax.rem(step + k, stages)
                    plgpu.barrier_wait(shared.ready.at[slot])
                    raw = load(shared.weight.at[slot, pl.ds(mine, own)], layout=WGMMA)
                    for start in range(0, DEPTH, CHUNK):
                        for half in range(packing):
                            some = [ofs[start // group : -(-(start + CHUNK) // group)] for ofs in now[half]]
                            numbers = unpack(raw[:, start : start + CHUNK], part_of(packing, half), *some)
                            tokens = shared.x.at[slot, :, pl.ds(half * DEPTH + start, CHUNK)]
                            plgpu.wgmma(total, numbers, tokens.transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(shared.free.at[slot])
                    return following

                def sums(total: Any) -> Array:
                    lax.fori_loop(0, turns, lambda k, now: turn(k, now, total), of_groups(jnp.int32(0)))
                    return total[...]

                scale: Any = SMALL
                if whole:  # read before the sums are there
                    scale = lax.broadcast_in_dim(column_of(scales, 0) * SMALL, (own, piece), (0,))
                total = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((own, rows), jnp.float32))
                for start in range(0, rows, piece):
                    some = (total[:, start : start + piece] * scale).astype(dtype)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    target = shared.out.at[member]
                    target.transpose((1, 0))[...] = plgpu.layout_cast(some, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(target, out.at[split, pl.ds(row + start, piece), outputs])

            for_each_item(multiply)
            plgpu.wait_smem_to_gmem(0)

    def tile_of(shape: tuple[int, ...], dtype: Any) -> Any:
        width = 128 // jnp.dtype(dtype).itemsize
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tile.splits, M, N), dtype),
        grid=(programs,),
        grid_names=("program",),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=[
            tile_of((stages, rows, depth), x.dtype),
            tile_of((stages, columns, DEPTH), values.dtype),
            tile_of((groups, piece, own), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # nobody reads what it wrote to shared memory
        ),
    )
    return run(x, values, scales, *([] if zeros is None else [zeros]))
