"""What a compiled attention kernel costs: its hot loop, the bytes it moves, and the time that follows from them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from tpu_cases import BATCHES, Case
from tpu_compiler import GENERATIONS
from tpu_schedule import Loop, Schedule

from kernels.pallas import decode, prefill
from kernels.pallas.call import Call
from kernels.pallas.layout import LANES, SUBLANES
from kernels.pallas.stream import UNROLLED

CHUNK = 2048  # tokens of the prompt that a prefill's time is predicted for


def product_loops(schedule: Schedule) -> list[Loop]:
    """-> the loops that keep the MXU busy themselves: what surrounds them may borrow it for other things."""
    products = lambda loop: loop.uses["MXU"]
    busy = [loop for loop in schedule.loops if products(loop) >= 8 and loop.bundles >= 50]
    return [loop for loop in busy if all(products(inner) < products(loop) for inner in loop.inside)]


def hot_loop(case: Case, call: Call, schedule: Schedule) -> tuple[Loop, int]:
    """-> the loop that most of the time goes into, and the KV tokens that a turn of it takes in.

    Decodes come before chunks, and in both the loop without masks comes before the one with; a window needs masks.
    """
    with_products = product_loops(schedule)
    windowed = call.spec.window is not None
    if case.only_decodes:
        return with_products[-1 if windowed else 0], call.blocks.decode_step if windowed else call.blocks.decode_kv
    of_chunks = with_products[2:]  # after the two of decodes
    deepest = max(loop.depth for loop in of_chunks)
    chunks = [loop for loop in of_chunks if loop.depth == deepest]
    most_products = max(chunks, key=lambda loop: loop.uses["MXU"])
    return most_products if windowed else chunks[0], call.blocks.prefill_kv


def smem_bytes(case: Case, call: Call) -> int:
    """-> bytes of SMEM: rows of the page table, and what is kept of each row and token."""
    rows, length, tokens = BATCHES[case.phase]
    return 4 * (call.blocks.tables * max(length // call.page_size, LANES) + 2 * rows + tokens)


def decode_costs(case: Case, call: Call, loop: Loop, tokens: int) -> dict[str, Any]:
    """-> what the decodes of a step cost: bundles for a KV token, bytes, and the time of all of them."""
    rows, length, _ = BATCHES[case.phase]
    copies = call.blocks.decode_kv // call.page_size
    in_a_loop = copies > UNROLLED and call.spec.window is None  # which is inside of the hot one
    per_token = (loop.bundles + (copies if in_a_loop else 1) * sum(inner.bundles for inner in loop.inside)) / tokens
    moved, must = decode_bytes(call, length)
    cycles = rows * min(length, call.spec.window or length) * per_token
    return dict(per_token=round(per_token, 3)) | _bound(case, rows * moved, rows * must, cycles)


def decode_row_cycles(call: Call, schedule: Schedule, length: int) -> float:
    """-> bundles of one decode with all that is done once a row: its write, its part of a group, its last block."""
    hot = product_loops(schedule)[0]
    row = next(loop for loop in schedule.loops if hot in loop.inside)
    group = next(loop for loop in schedule.loops if row in loop.inside)
    masked = max((loop for loop in row.inside if loop is not hot), key=lambda loop: loop.uses["MXU"])
    before = sum(loop.bundles for loop in schedule.loops if loop.depth == 1 and loop.first < group.first)
    whole = (length - 1) // call.blocks.decode_kv
    steps = -(-(length - whole * call.blocks.decode_kv) // call.blocks.decode_step)
    once = before + group.bundles / decode.group_size(call.tokens) + row.bundles
    return once + whole * hot.bundles + steps * masked.bundles


def decode_bytes(call: Call, length: int) -> tuple[int, int]:
    """-> bytes that a decode of one row moves, by its copies, and those that it must move."""
    spec, layout, page = call.spec, call.layout, call.page_size
    size = jnp.dtype(call.kv_dtype).itemsize
    token = layout.channels * layout.lanes * size
    needed = min(length, spec.window or length)
    first = (length - needed) // page * page
    pages = -(-length // page) - first // page
    queries = 2 * spec.num_kv_heads * spec.group * spec.head_dim * 2
    new = 2 * spec.num_kv_heads * spec.head_dim * 2
    must = needed * 2 * spec.num_kv_heads * spec.head_dim * size + queries + 2 * new
    return pages * page * token + 2 * SUBLANES * token + queries + new + 4 * (-(-length // page)), must


def prefill_costs(case: Case, call: Call, bundles: int) -> dict[str, Any]:
    """-> what a prompt of CHUNK tokens costs: bytes, time, and the share of peak FLOP/s where the loop has no masks."""
    spec, layout, page, block = call.spec, call.layout, call.page_size, call.blocks.prefill_kv
    chip = GENERATIONS[case.generation]
    step, repeats = prefill.block_tokens(call), turns(call)
    blocks = 0  # of pages, read for all blocks of queries
    for first in range(0, CHUNK, step):
        start = max(first - spec.window + 1, 0) // page * page if spec.window else 0
        blocks += -(-(min(first + step, CHUNK) - start) // block)
    size = jnp.dtype(call.kv_dtype).itemsize
    token = layout.channels * layout.lanes * size
    queries = 2 * CHUNK * spec.num_kv_heads * spec.group * spec.head_dim * 2
    new = 2 * CHUNK * spec.num_kv_heads * spec.head_dim * 2
    must = queries + new + CHUNK * 2 * spec.num_kv_heads * spec.head_dim * size
    moved = queries + new + CHUNK * token + blocks * block * token
    costs = _bound(case, moved, must, bundles * blocks * repeats)
    if repeats > 1 and spec.window is None:
        flops = 4 * step * spec.num_kv_heads * spec.group * block * spec.head_dim
        costs["flops_share"] = round(flops / (bundles * repeats) * chip.clock * chip.cores / chip.flops, 3)
    return costs


def turns(call: Call) -> float:
    """-> turns of a prefill's hot loop for a block of queries and one of pages: two units each, if there are four."""
    units = call.layout.heads * call.spec.group // prefill.unit_group(call)
    return units / 2 if units >= 4 else 1


def _bound(case: Case, moved: float, must: float, cycles: float) -> dict[str, Any]:
    chip = GENERATIONS[case.generation]
    by_memory, by_core = moved / chip.bandwidth, cycles / chip.clock
    return dict(
        moved_over_must=round(moved / must, 4), predicted_us=round(1e6 * max(by_memory, by_core), 1),
        bound="HBM" if by_memory > by_core else "core",
    )  # fmt: skip
