"""What the TPU compiler makes of the attention kernel, ahead of time and without a TPU: a table, and JSON.

    python scripts/tpu_report.py [--grid sample|full] [--only v6e llama-8b ...] [--out table.json]

For every generation, head configuration, KV dtype, page size and phase: compile time, memories, the hot loop's bundles
per KV token, MXU issue slots used and spills by the final schedule, bytes moved over those that must be, and the time
that follows from them: of the step's decodes, or of a prompt of 2048 tokens. What does not compile is a row too, with
the error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tpu_compiler import compile_for, mesh_of, prepare
from tpu_schedule import Schedule, read_schedule

DUMP = Path(tempfile.mkdtemp(prefix="tpu_report_"))
prepare(DUMP)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from tpu_cases import BATCHES, HEADS, LENGTH, ROWS, Case, batch_shapes, final_call, grid  # noqa: E402
from tpu_costs import decode_costs, hot_loop, prefill_costs, smem_bytes  # noqa: E402

from kernels.attention import RaggedBatch  # noqa: E402
from kernels.pallas import attention  # noqa: E402
from kernels.pallas.blocks import Blocks, Chip, this_chip  # noqa: E402


def compile_case(case: Case, blocks: Blocks | None = None) -> tuple[Any, Schedule, float]:
    """-> the executable, the kernel's schedule, and the seconds it took."""
    spec, tokens = HEADS[case.heads], BATCHES[case.phase][2]
    K, G, D = spec.num_kv_heads, spec.group, spec.head_dim
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    cache = attention.cache_spec(spec, ROWS * LENGTH // case.page + 1, case.page, case.kv_dtype)

    def by_head(q: Any, k: Any, v: Any, cache: Any, batch: RaggedBatch) -> Any:
        """Arguments lie as a model's projections leave them; the attention's own order is another name for that."""
        q, k, v = q.transpose(2, 0, 1, 3), k.swapaxes(0, 1), v.swapaxes(0, 1)
        out, cache = attention.update_and_attend(q, k, v, cache, batch, spec, blocks=blocks)
        return out.transpose(1, 2, 0, 3), cache

    shapes = bf16(K, G, tokens, D), bf16(K, tokens, D), bf16(K, tokens, D), cache, batch_shapes(case)
    shutil.rmtree(DUMP, ignore_errors=True)
    DUMP.mkdir()
    compiled, seconds = compile_for(mesh_of(case.generation), jax.jit(by_head, donate_argnums=3), (), shapes)
    return compiled, read_schedule(DUMP, "paged_attention"), seconds


def chip_of(generation: str) -> Chip:
    with jax.sharding.use_abstract_mesh(mesh_of(generation).abstract_mesh):
        return this_chip()


def measure(case: Case, blocks: Blocks | None = None) -> dict[str, Any]:
    """-> one row of the table. Errors: whatever the compiler raises."""
    call, vmem = final_call(case, chip_of(case.generation), blocks)
    compiled, schedule, seconds = compile_case(case, blocks)
    loop, tokens = hot_loop(case, call, schedule)
    memory = compiled.memory_analysis()
    row: dict[str, Any] = dict(
        compile_s=round(seconds, 1), vmem_kib=vmem >> 10, smem_bytes=smem_bytes(case, call),
        temporaries=memory.temp_size_in_bytes, aliased=memory.alias_size_in_bytes, bundles=loop.bundles,
        mxu=round(loop.share("MXU", schedule.capacity), 3), spills=loop.uses["VSTORE:SPILL"],
        spill_share=round(loop.uses["VSTORE:SPILL"] / loop.bundles, 3),
    )  # fmt: skip
    if case.only_decodes:
        return row | decode_costs(case, call, loop, tokens)
    return row | prefill_costs(case, call, loop.bundles)


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
