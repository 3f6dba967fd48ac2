"""Products with quantized weights on the GPU: a check against the reference, then bandwidth and rate.

    python scripts/bench_products.py [--formats fp8_block,int8,int4] [--tokens 1,8,64,256,4096] [--out FILE]

Shares are of the copy bandwidth and of the card's dense FP8 rate. Weights are read in turn from so many copies that
none stays in the second-level cache. Plans are those that the engine takes: tuned ones where there are some.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from machine import copy_bandwidth

sys.path.insert(0, str(Path(__file__).parents[1]))
from product_cases import (
    LIMIT,
    LLAMA_8B,
    compiled,
    copies_of,
    random_weight,
    relative_error,
    time_of,
    tokens_of,
    wanted,
)

from kernels.cuda.product import dtype_name, multiply, tuned_plan

FP8_RATE = 1460e12  # FLOP/s of an H200 through torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="fp8_block,int8,int4")
    parser.add_argument("--tokens", default="1,8,64,256,4096")
    parser.add_argument("--shapes", default="0,1,2,3", help="which of Llama-8B's: qkv, out, gate and up, down")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    limit, results = copy_bandwidth(), []
    tokens = list(map(int, options.tokens.split(",")))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: copies {limit / 1e12:.2f} TB/s", flush=True)
    device = jax.devices()[0].device_kind
    for name, shape in itertools.product(options.formats.split(","), map(int, options.shapes.split(","))):
        N, K = LLAMA_8B[shape]
        plain = name == "bfloat16"
        weight = jax.random.normal(jax.random.key(0), (N, K), jnp.bfloat16) if plain else random_weight(name, N, K)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
        copies = copies_of(weight)

        def one(M: int, weight: Any = weight, copies: Any = copies, plain: bool = plain) -> Any:
            """-> tokens, the plan and an executable, or what went wrong."""
            xs = tokens_of(M, weight.shape[1] if plain else weight.inputs)
            dot = lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))
            try:
                if plain:
                    return xs, None, compiled(dot, xs, copies)
                plan = tuned_plan(weight, M, device)
                return xs, plan, compiled(lambda x, w: multiply(x, w, x.dtype, plan), xs, copies)
            except Exception:
                return xs, None, traceback.format_exc()

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            made = list(pool.map(one, tokens))
        for M, (xs, plan, run) in zip(tokens, made, strict=True):
            what: dict[str, Any] = {"format": name, "M": M, "N": N, "K": K}
            if not plain:
                what |= {"dtype": dtype_name(weight), "kernel": plan and plan.kernel, "tile": plan and list(plan.tile)}
            try:
                if isinstance(run, str):
                    raise RuntimeError(run)
                if not plain:
                    what["error"] = relative_error(run(xs, copies)[0], wanted(xs[0], weight))
                took = time_of(run, xs, copies)
                moved = size + 2 * M * (N + K)
                what |= {
                    "us": took * 1e6,
                    "bandwidth": moved / took / limit,
                    "fp8_rate": 2 * M * N * K / took / FP8_RATE,
                }
            except Exception:
                what["failure"] = traceback.format_exc()
            results.append(what)
            print(described(what), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))


def described(what: dict[str, Any]) -> str:
    head = f"{what['format']} {what['M']} x {what['N']} x {what['K']} {what.get('kernel', '')} {what.get('tile', '')}"
    if "failure" in what:
        return f"{head}: {what['failure'].strip().splitlines()[-1][:160]}"
    figures = f"{what['us']:.1f} us, {what['bandwidth']:.0%} of copies, {what['fp8_rate']:.1%} of FP8's rate"
    if "error" not in what:
        return f"{head}: {figures}"
    return f"{head}: {figures}, error {what['error']:.1e}{'' if what['error'] < LIMIT else ' TOO LARGE'}"


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
