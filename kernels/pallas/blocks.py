"""How large a kernel's blocks are: what fits the TPU's memories, computed for each generation before it is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas.layout import EDGE, LANES, SUBLANES, Layout, ceil_to

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec

VMEM_SHARE = 0.75  # of VMEM for blocks; the compiler needs some for what it spills, and XLA for its own operands
SMEM_SHARE = 0.75
UNIT_ROWS = 512  # of queries in a prefill's unit: enough to hide the MXU's latency, few enough for the registers
WEIGHT_REGISTERS = 32  # of a decode's weights at once: half of a core's vector registers


class Chip(NamedTuple):
    """One TensorCore's generation, its memories in bytes, and the width of its MXUs."""

    generation: str
    vmem: int
    smem: int
    mxu: int


SMALLEST = Chip("v4", 16 << 20, 1 << 20, 128)  # of the generations that there are


def this_chip() -> Chip:
    """-> the chip of the mesh or device in use; elsewhere, such as in interpret mode, the smallest."""
    if not pltpu.is_tpu_device():
        return SMALLEST
    info = pltpu.get_tpu_info()
    return Chip(str(info.chip_version), info.vmem_capacity_bytes, info.smem_capacity_bytes, info.mxu_column_size)


@dataclass(frozen=True)
class Blocks:
    """Sizes in tokens, unless said otherwise."""

    pack: int  # KV heads that one product of a decode scores together
    decode_kv: int  # of a block of pages in a decode
    decode_step: int = 256  # of what is worked on together where a mask is needed
    prefill_q: int = 128
    prefill_kv: int = 512
    unit_rows: int = 512  # rows of queries (tokens * query heads) of a unit, at most
    slots: int = 3  # blocks of pages in VMEM
    tables: int = 8  # rows of the page table in SMEM
    write: int = 64  # of a piece of a page that is written at once


def preferred(spec: AttentionSpec, layout: Layout, chip: Chip, page_size: int) -> Blocks:
    """-> the sizes to begin with, without regard to memory."""
    heads = layout.heads
    pack = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * layout.lanes <= chip.mxu))
    registers = heads // pack * ceil_to(pack * spec.group, SUBLANES) // SUBLANES  # for 128 tokens' weights
    block = LANES
    while block < 1024 and 2 * block // LANES * registers <= WEIGHT_REGISTERS:
        block *= 2
    block = max(block, page_size)
    return Blocks(
        pack,
        block,
        decode_step=min(block, 256),
        prefill_q=ceil_to(UNIT_ROWS // min(spec.group, 4), EDGE),
        prefill_kv=max(512, page_size),
        unit_rows=UNIT_ROWS,
    )


def smaller(blocks: Blocks, page_size: int) -> Iterator[Blocks]:
    """Yields ways to need less VMEM, the best first."""
    least = max(LANES, page_size)
    floors = (
        ("prefill_q", 80), ("prefill_kv", max(least, 256)), ("slots", 2), ("decode_kv", max(least, 512)),
        ("prefill_q", EDGE), ("decode_kv", least), ("prefill_kv", least), ("write", SUBLANES),
    )  # fmt: skip
    for name, floor in floors:
        now = getattr(blocks, name)
        fewer = now - 1 if name == "slots" else ceil_to(now // 2, EDGE if name == "prefill_q" else SUBLANES)
        if floor <= fewer < now:
            yield replace(blocks, **{name: fewer})


def padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """-> bytes of an array in VMEM, whose last two axes are padded to whole tiles."""
    *outer, rows, lanes = (1, 1, *shape)[-max(len(shape), 2) :]
    size = jnp.dtype(dtype).itemsize
    total = ceil_to(rows, SUBLANES) * ceil_to(lanes, LANES) * size
    for n in outer:
        total *= n
    return total


def fit(first: Blocks, page_size: int, vmem_bytes: Callable[[Blocks], int], chip: Chip) -> Blocks:
    """-> the largest blocks that fit. Errors: ValueError with the figures, if none do."""
    blocks, limit = first, int(chip.vmem * VMEM_SHARE)
    while (needed := vmem_bytes(blocks)) > limit:
        found = next(smaller(blocks, page_size), None)
        if found is None:
            raise ValueError(
                f"attention needs {needed >> 10} KiB of VMEM with its smallest blocks, and this TPU has {limit >> 10} "
                f"KiB for it: use smaller pages (block_size is {page_size}), or tensor parallelism for fewer heads"
            )
        blocks = found
    return blocks


def fit_tables(pages: int, other_bytes: int, most: int, chip: Chip) -> int:
    """-> how many rows of the page table SMEM has room for. Errors: ValueError if fewer than two."""
    room = int(chip.smem * SMEM_SHARE) - other_bytes
    rows = min(most, room // (4 * ceil_to(pages, LANES)))
    if rows < 2:
        raise ValueError(
            f"attention needs two rows of the page table in SMEM: {pages} pages a row, after {other_bytes} bytes for "
            f"what it keeps of rows and tokens, do not fit {chip.smem} bytes: use larger pages (block_size), a smaller "
            "max_model_len, max_num_seqs or max_num_batched_tokens"
        )
    return rows
