"""How large a kernel's blocks are: what fits the TPU's memories, computed for each generation before it is compiled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas.layout import LANES, SUBLANES, Layout, ceil_to

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec

VMEM_SHARE = 0.7  # of VMEM for blocks; the compiler needs some for what it spills, and XLA for its own operands
SMEM_SHARE = 0.75
WEIGHT_REGISTERS = 32  # of a decode's weights at once: half of a core's vector registers


class Chip(NamedTuple):
    """One TensorCore's memories in bytes, and the width of its MXUs."""

    vmem: int
    smem: int
    mxu: int


SMALLEST = Chip(16 << 20, 1 << 20, 128)  # of the generations that there are: TPU v4


def this_chip() -> Chip:
    """-> the chip of the mesh or device in use; elsewhere, such as in interpret mode, the smallest."""
    if not pltpu.is_tpu_device():
        return SMALLEST
    info = pltpu.get_tpu_info()
    return Chip(info.vmem_capacity_bytes, info.smem_capacity_bytes, info.mxu_column_size)


@dataclass(frozen=True)
class Blocks:
    """Sizes in tokens, unless said otherwise."""

    pack: int  # KV heads that one product of a decode scores together
    decode_kv: int  # of a block of pages in a decode
    decode_step: int = 256  # of what is worked on together where a mask is needed
    prefill_q: int = 128
    prefill_kv: int = 512
    unit_rows: int = 512  # rows of queries (tokens * query heads) of a unit, about
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
    return Blocks(pack, block, decode_step=min(block, 256), prefill_kv=max(512, page_size))


def smaller(blocks: Blocks, page_size: int) -> Iterable[Blocks]:
    """Yields ways to need less VMEM, the best first."""
    least = max(LANES, page_size)
    if blocks.prefill_q > 64:
        yield replace(blocks, prefill_q=blocks.prefill_q // 2)
    if blocks.prefill_kv > max(least, 256):
        yield replace(blocks, prefill_kv=blocks.prefill_kv // 2)
    if blocks.slots > 2:
        yield replace(blocks, slots=blocks.slots - 1)
    if blocks.decode_kv > least:
        half = blocks.decode_kv // 2
        yield replace(blocks, decode_kv=half, decode_step=min(half, blocks.decode_step))
    if blocks.prefill_q > SUBLANES:
        yield replace(blocks, prefill_q=blocks.prefill_q // 2)
    if blocks.prefill_kv > least:
        yield replace(blocks, prefill_kv=blocks.prefill_kv // 2)
    if blocks.write > SUBLANES:
        yield replace(blocks, write=blocks.write // 2)


def padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """-> bytes of an array in VMEM, whose last two axes are padded to whole tiles."""
    *outer, rows, lanes = (1, 1, *shape)[-max(len(shape), 2) :]
    size = jnp.dtype(dtype).itemsize
    total = ceil_to(rows, SUBLANES) * ceil_to(lanes, LANES) * size
    for n in outer:
        total *= n
    return total
