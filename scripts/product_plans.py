"""The ways to compute a product on a GPU that a search goes through, and which of them cannot fit."""

from __future__ import annotations

from collections.abc import Iterator

from product_cases import QuantizedTensor

from kernels.cuda import hopper_narrow, hopper_packed, vector
from kernels.cuda.matrix import SHARED_MEMORY, Tile
from kernels.cuda.product import BLOCK, CHANNEL, PACKED, THIN, Plan, kind_of, on_hopper

REGISTERS = 255  # of a thread
FIELDS = ("columns", "splits", "warps", "depth", "stages", "swapped")  # of a tile, in the order of their weight
VALUES = {
    "columns": (16, 32, 64, 128, 256),
    "splits": (1, 2, 4, 8),
    "warps": (2, 4, 8),
    "depth": (64, 128, 256),
    "stages": (3, 4, 5, 6, 8),
    "swapped": (False, True),
}
VECTOR_VALUES = {
    "columns": (2, 4, 8, 16),
    "splits": (1,),
    "warps": (2, 4, 8),
    "depth": (512, 1024, 2048, 4096),
    "stages": (1, 2, 4),
    "swapped": (False,),
}
PACKED_VALUES = {
    "columns": (128, 256),
    "splits": hopper_packed.SPLITS,
    "warps": (8, 16),
    "depth": (hopper_packed.DEPTH,),
    "stages": hopper_packed.STAGES,
    "swapped": (False,),
}


def starts(weight: QuantizedTensor, M: int, default: Plan) -> list[Plan]:
    """-> the default, and one plan of every other kernel that takes the product."""
    kind, N, K = kind_of(weight), weight.values.shape[0], weight.inputs
    rows = max(16, min(128, 1 << (M - 1).bit_length()))
    tile = Tile(rows, 64, 128) if rows <= 64 else Tile(rows, 128, 128, warps=8, stages=3)
    found = [default]
    if M <= 256 or default.kernel != "hopper":  # with more tokens Triton's take more than twice as long as Hopper's
        found += [Plan("triton", tile._replace(splits=splits)) for splits in ((1, 4) if M <= THIN else (1,))]
    if M <= vector.MOST_TOKENS and vector.supports(weight) is None:
        found.append(Plan("vector", Tile(1, 8, 1024, stages=1)))
    if kind == BLOCK and M <= 16:
        found.append(Plan("inside", tile))
    if kind == BLOCK and K // weight.scales.shape[1] == hopper_narrow.BLOCK and on_hopper():
        shapes = [(rows, columns) for rows, columns in hopper_narrow.TILES if rows <= M or rows == hopper_narrow.ROWS]
        found += [Plan("hopper", hopper_narrow.filling(*shape, M, N, K)) for shape in shapes]
    if kind == PACKED and hopper_packed.supports(weight) is None and on_hopper():
        found += [Plan("hopper_packed", tile) for tile in hopper_packed.tiles_of(weight, M)]
    if kind == CHANNEL or (kind == PACKED and M >= 256):
        found.append(Plan("library"))
    return list(dict.fromkeys(plan for plan in found if fits(plan, weight)))


def neighbours(plan: Plan, field: str, weight: QuantizedTensor) -> Iterator[Plan]:
    """-> the plan with other values of one field of its tile, those that fit."""
    if plan.kernel == "library" or (plan.kernel == "hopper" and field not in ("splits", "stages")):
        return
    for value in {"vector": VECTOR_VALUES, "hopper_packed": PACKED_VALUES}.get(plan.kernel, VALUES)[field]:
        other = plan._replace(tile=plan.tile._replace(**{field: value}))
        if other != plan and fits(other, weight):
            yield other


def fits(plan: Plan, weight: QuantizedTensor) -> bool:
    """-> whether a plan cuts the product into whole parts that have room: known without compiling it."""
    kernel, tile = plan
    if kernel == "library":
        return True
    if kernel == "hopper":
        return hopper_narrow.supports(weight.values.shape[0], weight.inputs, tile)
    if kernel == "hopper_packed":
        return hopper_packed.fits(weight, tile)
    layout, K, N = weight.layout, weight.inputs, weight.values.shape[0]
    if kernel == "vector":  # 1 to 8 loads of 16 bytes a thread are on their way
        return 512 * tile.warps <= tile.columns * tile.depth * tile.stages <= 4096 * tile.warps
    kind, group = kind_of(weight), K // weight.scales.shape[1]
    if kind == PACKED and layout.packing == 2:
        if tile.depth != 128:  # it has no meaning there: one value is enough
            return False
        depth = 2 * layout.split
    else:
        depth = tile.depth
    if K % (depth * tile.splits) or (max(depth, group) % min(depth, group)) or tile.columns > N:
        return False
    if kind == BLOCK and max(tile.columns, layout.rows) % min(tile.columns, layout.rows):
        return False
    if kernel == "inside" and depth < group:
        return False
    wide = 1 if kind != PACKED and kernel == "triton" else 2
    bytes_of_stage = tile.rows * depth * wide + tile.columns * depth // layout.packing
    threads = 32 * tile.warps
    # Sums twice, since a turn's are added to the others', and a turn's weights as pairs of 16 bits.
    registers = (2 * tile.rows * tile.columns + tile.columns * depth // (2 * layout.packing)) // threads
    return tile.stages * bytes_of_stage <= SHARED_MEMORY and registers <= REGISTERS
