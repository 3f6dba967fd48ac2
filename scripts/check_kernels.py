"""An accelerator's attention kernels against the dense reference, on the device itself, over the tests' cases.

    python scripts/check_kernels.py [--backend triton] [--out check.json]

Prints each case's relative error (largest difference over the largest value); exit code 1 if one is over its limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernels.attention import BACKENDS, AttentionSpec
from tests.kernels.cases import CASES, CHUNKS, DECODES, Case, run

LIMITS = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}


def cases() -> list[tuple[Case, str]]:
    """-> the shared cases, and what only a device can run in good time: every page size, large heads, long contexts."""
    spec = AttentionSpec(2, 4, 128, 128**-0.5)
    long = ((1, 8000), (1, 3), (1, 4095), (700, 3000), (64, 0), (2000, 0))
    more = [Case(f"page {size}", spec, long, page_size=size) for size in (8, 16, 32, 64, 128, 256)]
    more += [Case(f"head {size}", AttentionSpec(2, 3, size, size**-0.5), long) for size in (64, 80, 96, 256)]
    more += [Case(f"{dtype}, long", spec, long, kv_dtype=dtype) for dtype in ("float8_e4m3fn", "float8_e5m2")]
    more += [Case("many rows, unsplit", spec, DECODES * 40), Case("few rows, split", spec, ((1, 8000), (1, 8001)))]
    more += [Case("window, sinks, cap", replace(spec, window=129, soft_cap=20.0), CHUNKS, sinks=True)]
    few = {"decode", "mixed", "page 16"}  # that are run in float32 and float16, too
    every = [(case, dtype) for case in (*CASES, *more) for dtype in LIMITS]
    return [(case, dtype) for case, dtype in every if dtype == "bfloat16" or case.name in few]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="triton", choices=BACKENDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    backend, results, failures = BACKENDS[options.backend], [], 0
    for case, dtype in cases():
        why = backend.supports(case.spec, case.page_size, case.kv_dtype or dtype)
        if why:
            print(f"{case.name:24} {dtype:9} not supported: {why}")
            continue
        got, wanted, *_ = run(case, backend, dtype)
        error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        failed = not error < LIMITS[dtype]
        failures += failed
        results.append({"case": case.name, "dtype": dtype, "relative_error": error})
        print(f"{case.name:24} {dtype:9} {error:.1e}{'  OVER ' + str(LIMITS[dtype]) if failed else ''}", flush=True)
    print(f"{len(results)} cases, {failures} over their limit")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
