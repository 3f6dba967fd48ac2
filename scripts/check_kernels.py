"""An accelerator's attention kernels against the dense reference, on the device itself, over the tests' cases.

    python scripts/check_kernels.py [--backend auto] [--few] [--only NAME,NAME] [--out check.json]

Prints each case's relative error (largest difference over the largest value); exit code 1 if one is over its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernels.attention import BACKENDS, AttentionSpec, choose_backend
from tests.kernels.cases import CASES, CHUNKS, DECODES, Case, run

LIMITS = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}


def cases(few: bool) -> list[tuple[Case, str]]:
    """-> the tests' cases, and what only a device can run in good time: every page size, large heads, long contexts.

    `few`: the tests' alone, in bfloat16: Hopper's own kernel takes seconds to compile, one after the other.
    """
    if few:
        return [(case, "bfloat16") for case in CASES]
    spec = AttentionSpec(2, 4, 128, 128**-0.5)
    long = ((1, 8000), (1, 3), (1, 4095), (700, 3000), (64, 0), (2000, 0))
    more = [Case(f"page {size}", spec, long, page_size=size) for size in (8, 16, 32, 64, 128, 256)]
    more += [Case(f"head {size}", AttentionSpec(2, 3, size, size**-0.5), long) for size in (64, 80, 96, 256)]
    more += [Case(f"{dtype}, long", spec, long, kv_dtype=dtype) for dtype in ("float8_e4m3fn", "float8_e5m2")]
    more += [Case("many rows, unsplit", spec, DECODES * 40), Case("few rows, split", spec, ((1, 8000), (1, 8001)))]
    more += [Case("window, sinks, cap", replace(spec, window=129, soft_cap=20.0), CHUNKS, sinks=True)]
    thorough = {"decode", "mixed", "page 16"}  # that are run in float32 and float16, too
    every = [(case, dtype) for case in (*CASES, *more) for dtype in LIMITS]
    return [(case, dtype) for case, dtype in every if dtype == "bfloat16" or case.name in thorough]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    parser.add_argument("--few", action="store_true", help="the tests' cases alone, in bfloat16")
    parser.add_argument("--only", help="names of cases, with commas between them and _ for what is a comma in them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.only and set(options.only.split(","))
    platform, results = jax.devices()[0].platform, []

    def check(item: tuple[Case, str]) -> dict[str, Any]:
        case, dtype = item
        try:
            backend = choose_backend(options.backend, platform, {case.spec}, case.page_size, case.kv_dtype or dtype)
        except ValueError as error:
            return {"case": case.name, "dtype": dtype, "refused": str(error)}
        got, wanted, *_ = run(case, backend, dtype)
        error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        return {"case": case.name, "dtype": dtype, "backend": backend.name, "relative_error": error}

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # most of the time goes to compiling
        chosen = [item for item in cases(options.few) if not names or item[0].name.replace(",", "_") in names]
        for result in pool.map(check, chosen):
            results.append(result)
            print("  ".join(f"{v:.1e}" if isinstance(v, float) else f"{v:9}" for v in result.values()), flush=True)
    failures = sum(not r["relative_error"] < LIMITS[r["dtype"]] for r in results if "relative_error" in r)
    print(f"{len(results)} cases, {failures} over their limit")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
