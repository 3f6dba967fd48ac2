"""What the TPU compiler makes of the attention kernel, ahead of time and without a TPU: a table, and JSON.

    python scripts/tpu_report.py [--grid sample|full] [--only v6e llama-8b ...] [--out table.json] [--steps]

For every generation, head configuration, KV dtype, page size and phase: compile time, memories, the hot loop's bundles
per KV token, MXU issue slots used and spills by the final schedule, bytes moved over those that must be, and the time
that follows from them. Cases that do not compile are rows too, with the error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tpu_compiler import GENERATIONS, compile_for, mesh_of, prepare
from tpu_schedule import Loop, Schedule, read_schedule

DUMP = Path(tempfile.mkdtemp(prefix="tpu_report_"))
prepare(DUMP)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from tpu_cases import HEADS, LENGTH, ROWS, Case, batch_shapes, final_call, grid  # noqa: E402

from kernels.attention import RaggedBatch  # noqa: E402
from kernels.pallas import attention, prefill  # noqa: E402
from kernels.pallas.blocks import Blocks, Chip, this_chip  # noqa: E402
from kernels.pallas.call import Call  # noqa: E402
from kernels.pallas.layout import SUBLANES  # noqa: E402
from kernels.pallas.stream import UNROLLED  # noqa: E402


def compile_case(case: Case, blocks: Blocks | None = None) -> tuple[Any, Schedule, float]:
    """-> the executable, the kernel's schedule, and the seconds it took."""
    spec = HEADS[case.heads]
    batch, tokens = batch_shapes(case.phase, case.page)
    K, G, D = spec.num_kv_heads, spec.group, spec.head_dim
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    cache = attention.cache_spec(spec, ROWS * LENGTH // case.page + 1, case.page, case.kv_dtype)

    def by_head(q: Any, k: Any, v: Any, cache: Any, batch: RaggedBatch) -> Any:
        """Arguments lie as a model's projections leave them; the attention's own order is another name for that."""
        q, k, v = q.transpose(2, 0, 1, 3), k.swapaxes(0, 1), v.swapaxes(0, 1)
        out, cache = attention.update_and_attend(q, k, v, cache, batch, spec, blocks=blocks)
        return out.transpose(1, 2, 0, 3), cache

    shapes = bf16(K, G, tokens, D), bf16(K, tokens, D), bf16(K, tokens, D), cache, batch
    shutil.rmtree(DUMP, ignore_errors=True)
    DUMP.mkdir()
    compiled, seconds = compile_for(mesh_of(case.generation), jax.jit(by_head, donate_argnums=3), (), shapes)
    return compiled, read_schedule(DUMP, "paged_attention"), seconds


def chip_of(generation: str) -> Chip:
    with jax.sharding.use_abstract_mesh(mesh_of(generation).abstract_mesh):
        return this_chip()


def hot_loop(case: Case, call: Call, schedule: Schedule) -> tuple[Loop, int]:
    """-> the loop that most of the time goes into, and the KV tokens that a turn of it takes in.

    Decodes come before chunks, and in both the loop without masks comes before the one with; a window needs masks.
    """
    with_products = [loop for loop in schedule.loops if loop.uses["MXU"] >= 8 and loop.bundles >= 50]
    windowed = call.spec.window is not None
    if case.phase == "decode":
        return with_products[-1 if windowed else 0], call.blocks.decode_step if windowed else call.blocks.decode_kv
    of_chunks = with_products[2:]  # after the two of decodes
    deepest = max(loop.depth for loop in of_chunks)
    chunks = [loop for loop in of_chunks if loop.depth == deepest]
    return chunks[len(chunks) // 2 if windowed else 0], call.blocks.prefill_kv


def total(loop: Loop, turns: int = 1) -> int:
    """-> bundles of a loop and of the loops in it, which take so many turns."""
    return loop.bundles + turns * sum(total(inner) for inner in loop.inside)


def copies_in_a_loop(call: Call) -> int:
    """-> the turns of the loop in a decode's that starts a block's copies; 1 where they are written out."""
    copies = call.blocks.decode_kv // call.page_size
    return copies if copies > UNROLLED and call.spec.window is None else 1


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


def smem_bytes(call: Call) -> int:
    """-> bytes of SMEM: rows of the page table, and what is kept of each row and token."""
    return 4 * (call.blocks.tables * max(LENGTH // call.page_size, 128) + 2 * ROWS + call.tokens)


def measure(case: Case, blocks: Blocks | None = None) -> dict[str, Any]:
    """-> one row of the table. Errors: whatever the compiler raises."""
    call, vmem = final_call(case, chip_of(case.generation), blocks)
    compiled, schedule, seconds = compile_case(case, blocks)
    loop, tokens = hot_loop(case, call, schedule)
    memory = compiled.memory_analysis()
    chip = GENERATIONS[case.generation]
    row: dict[str, Any] = dict(
        compile_s=round(seconds, 1), vmem_kib=vmem >> 10, smem_bytes=smem_bytes(call),
        temporaries=memory.temp_size_in_bytes, aliased=memory.alias_size_in_bytes, bundles=loop.bundles,
        mxu=round(loop.share("MXU", schedule.capacity), 3), spills=loop.uses["VSTORE:SPILL"],
        spill_share=round(loop.uses["VSTORE:SPILL"] / loop.bundles, 3),
    )  # fmt: skip
    if case.phase == "decode":
        moved, must = decode_bytes(call, LENGTH)
        per_token = total(loop, copies_in_a_loop(call)) / tokens
        context = min(LENGTH, call.spec.window or LENGTH)
        by_memory, by_core = ROWS * moved / chip.bandwidth, ROWS * context * per_token / chip.clock
        row |= dict(
            per_token=round(per_token, 3), moved_over_must=round(moved / must, 4),
            predicted_us=round(1e6 * max(by_memory, by_core), 1), bound="HBM" if by_memory > by_core else "core",
        )  # fmt: skip
    else:
        some = prefill.unit_group(call)
        units = call.layout.heads * call.spec.group // some
        rows = some * prefill.block_tokens(call) * (2 if units >= 4 else units)  # of queries in a turn of the loop
        flops = 4 * rows * tokens * call.spec.head_dim
        row["bound"] = "core"
        if units >= 4 and call.spec.window is None:  # else the loop is not the one that repeats
            row["flops_share"] = round(flops / total(loop) * chip.clock * chip.cores / chip.flops, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("sample", "full"), default="sample")
    parser.add_argument("--only", nargs="*", default=[], help="parts of a case that it must have, each of them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    failed = 0
    for case in grid(options.grid):
        name = " ".join(map(str, case))
        if any(part not in map(str, case) for part in options.only) or (
            options.grid == "full" and "bundles" in table.get(name, {})
        ):
            continue
        try:
            table[name] = measure(case)
        except Exception as error:  # the table says what does not compile
            table[name] = {"error": " ".join(str(error).split())[:300]}
            failed += 1
        print(f"{name:44}" + "  ".join(f"{k} {v}" for k, v in table[name].items()), flush=True)
        if options.out:
            options.out.write_text(json.dumps(table, indent=1) + "\n")
    shutil.rmtree(DUMP, ignore_errors=True)
    print(f"{len(table)} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
