"""Find block sizes of the TPU attention kernel: by static schedule without a TPU, by time on one.

    python scripts/tune_tpu_attention.py --generation v6e [--heads llama-8b] [--page 128] [--write]
    python scripts/tune_tpu_attention.py --by time ...      # on a TPU of that generation

Candidates are ranked by bundles per KV token for decodes, and by the share of peak FLOP/s for chunks. The best go to
kernels/tuned/tpu_<generation>.json, if they are better than the computed ones by more than 2 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from tpu_compiler import GENERATIONS

DECODE = [dict(pack=pack, decode_kv=size) for pack in (1, 2, 4) for size in (256, 512, 1024, 2048)]
PREFILL = [dict(prefill_q=q, prefill_kv=kv, unit_rows=m) for q in (128, 256) for kv in (256, 512) for m in (512, 1024)]
GAIN = 0.98  # of the computed blocks' cost that a candidate must stay below


def best(case: Any, chip: Any, candidates: list[dict[str, int]], cost: Callable[..., float]) -> dict[str, int]:
    """cost(case, blocks), of which less is better -> the candidate that is better than the computed blocks, if any."""
    from tpu_cases import HEADS, final_call

    computed = final_call(case, chip)[0].blocks
    least, found = GAIN * cost(case, None), {}
    print(f"computed: {least / GAIN:.4g}  {asdict(computed)}", flush=True)
    for sizes in candidates:
        if HEADS[case.heads].num_kv_heads % sizes.get("pack", 1) or sizes.get("decode_kv", case.page) < case.page:
            continue
        try:
            here = cost(case, replace(computed, **sizes))
        except Exception as error:  # a candidate may be too large for the compiler
            print(f"{sizes}: {str(error).splitlines()[0][:80]}", flush=True)
            continue
        print(f"{here:.4g}  {sizes}", flush=True)
        if here < least:
            least, found = here, sizes
    return found


def by_schedule(case: Any, blocks: Any) -> float:
    from tpu_report import measure

    row = measure(case, blocks)
    return row["per_token"] if case.only_decodes else 1 / row["flops_share"]


def by_time(case: Any, blocks: Any) -> float:
    from bench_kernels import measure
    from tpu_cases import BATCHES, HEADS

    from kernels.attention import BACKENDS

    backend = BACKENDS["tpu"]
    backend = backend._replace(update_and_attend=partial(backend.update_and_attend, blocks=blocks))
    rows, length, tokens = BATCHES[case.phase]
    rows, count = (rows, 1) if case.only_decodes else (1, tokens)
    return measure(backend, HEADS[case.heads], rows, length, count, case.page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=GENERATIONS, required=True)
    parser.add_argument("--heads", default="llama-8b")
    parser.add_argument("--kv-dtype", default="bfloat16")
    parser.add_argument("--page", type=int, default=128)
    parser.add_argument("--phases", nargs="*", choices=("decode", "prefill"), default=("decode", "prefill"))
    parser.add_argument("--by", choices=("schedule", "time"), default="schedule")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.by == "schedule":
        from tpu_report import chip_of  # sets what JAX reads when it is loaded, which is why it was not before

        chip = chip_of(options.generation)
    else:
        from kernels.pallas.blocks import this_chip

        chip = this_chip()
    from tpu_cases import Case, final_call

    from kernels.pallas.tuned import FOLDER, shape_key

    sizes: dict[str, Any] = {}
    for phase in options.phases:
        case = Case(options.generation, options.heads, options.kv_dtype, options.page, phase)
        candidates = DECODE if phase == "decode" else PREFILL
        sizes |= best(case, chip, candidates, by_schedule if options.by == "schedule" else by_time)
    print(f"better: {sizes or 'nothing'}")
    if options.write and sizes:
        path = FOLDER / f"tpu_{chip.generation}.json"
        table = json.loads(path.read_text()) if path.exists() else {}
        key = shape_key(final_call(case, chip)[0])
        table[key] = table.get(key, {}) | sizes
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
