"""Products with quantized weights on the GPU: a check against the reference, then bandwidth and rate.

    python scripts/bench_products.py [--formats fp8_block,int8,int4] [--tokens 1,8,64,256,4096] [--sweep] [--out FILE]

Shares are of the copy bandwidth and of the card's dense FP8 rate. Weights are read in turn from so many copies that
none stays in the second-level cache. --sweep tries other tiles and kernels than those that the engine would take.
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
from machine import copy_bandwidth, seconds

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernels.cuda.matrix import Tile
from kernels.cuda.product import BLOCK, Plan, default_plan, kind_of, multiply
from kernels.product import reference
from kernels.quantized import Layout, QuantizedTensor, quantize

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # Llama-8B's, [N, K]
FP8_RATE = 1460e12  # FLOP/s of an H200 through torch
LAYOUTS = {
    "fp8_block": Layout("fp8", 128, 128, "token_group"),
    "fp8": Layout("fp8", activations="token"),
    "int8_w8a8": Layout("int8", activations="token"),
    "int8": Layout("int8"),
    "q8_0": Layout("int8", 32),
    "int4": Layout("int4", 128, split=128),
    "int4_32": Layout("int4", 32, split=128),
}
COPIES = 12
LIMIT = 2e-2  # of the relative error


def random_weight(name: str, N: int, K: int) -> QuantizedTensor:
    if name in LAYOUTS:
        return jax.jit(quantize, static_argnums=1)(jax.random.normal(jax.random.key(1), (N, K)), LAYOUTS[name])
    bits = lambda i, *shape: jax.random.bits(jax.random.key(i), shape, jnp.uint8)
    half = lambda i, *shape: jax.random.uniform(jax.random.key(i), shape, minval=1e-3, maxval=2e-3).astype(jnp.float16)
    values = bits(2, N, K // 2)
    if name == "mxfp4":
        return QuantizedTensor(Layout(name, 32, split=128), values, bits(3, N, K // 32) // 16 + 112)
    supers = dict(super_scales=half(4, N, K // 256))
    if name == "q4_k":
        minima = dict(minima=bits(5, N, K // 32) // 4, super_minima=half(6, N, K // 256))
        return QuantizedTensor(Layout(name, 32, split=128), values, bits(7, N, K // 32) // 4, **minima, **supers)
    if name == "q6_k":
        scales = bits(8, N, K // 16).astype(jnp.int8)
        return QuantizedTensor(Layout(name, 16, split=128), values, scales, high=bits(9, N, K // 4), **supers)
    raise ValueError(f"--formats: no {name!r}: {', '.join(LAYOUTS)}, mxfp4, q4_k or q6_k")


def plans(weight: QuantizedTensor, M: int, sweep: bool) -> list[Plan]:
    """-> the default plan, and with `sweep` others."""
    kind, (N, K) = kind_of(weight), (weight.values.shape[0], weight.inputs)
    if kind is None:
        return [Plan("library")]
    default = default_plan(kind, M, N, K, K // weight.scales.shape[1])
    if not sweep:
        return [default]
    if weight.layout.activations == "token":
        return [Plan("library"), Plan("triton", Tile(max(16, min(M, 128)), 64, 128))]
    few = [(32, 1, 4, 5), (64, 1, 4, 5), (64, 2, 4, 5), (64, 4, 4, 4), (32, 2, 4, 6), (128, 4, 8, 4)]
    kernels = ("inside", "triton") if kind == BLOCK and M <= 16 else ("triton",)
    if M <= 16:
        found = [Plan(k, Tile(16, n, 128, s, w, d)) for k, (n, s, w, d) in itertools.product(kernels, few)]
        found += [Plan(kernels[0], Tile(16, 64, 128, s, 4, 5, swapped=True)) for s in (1, 4)]
        if kind != BLOCK:
            found += [Plan("triton", Tile(16, 64, 256, 2, 4, 4)), Plan("triton", Tile(16, 32, 256, 1, 4, 4))]
    elif M <= 64:
        found = [
            Plan("triton", Tile(M, n, 128, s, 4, d)) for n, s, d in ((64, 1, 4), (128, 1, 3), (64, 4, 4), (32, 1, 4))
        ]
        found += [Plan("triton", Tile(M, 64, 128, 2, 4, 4, swapped=True))]
    else:
        found = [Plan("triton", Tile(128, 128, 128, 1, 8, 3))]
        found += [Plan("triton", Tile(64, 128, 128, 1, 4, 3))] if M < 4096 else []
        found += [Plan("library")] if kind != BLOCK else []
    if kind == BLOCK and M >= 64:
        found += [Plan("hopper", Tile(128, 128, 128, stages=5)), Plan("hopper", Tile(64, 256, 128, stages=4))]
    return list(dict.fromkeys([default, *found]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="fp8_block,int8,int4")
    parser.add_argument("--tokens", default="1,8,64,256,4096")
    parser.add_argument("--shapes", default="0,1,2,3", help="which of Llama-8B's: qkv, out, gate and up, down")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    limit, results = copy_bandwidth(), []
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: copies {limit / 1e12:.2f} TB/s", flush=True)
    for name, shape in itertools.product(options.formats.split(","), map(int, options.shapes.split(","))):
        N, K = SHAPES[shape]
        plain = name == "bfloat16"
        weight = jax.random.normal(jax.random.key(0), (N, K), jnp.bfloat16) if plain else random_weight(name, N, K)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
        copies = [weight, *(jax.tree.map(jnp.copy, weight) for _ in range(COPIES - 1))]
        cases = []
        for M in map(int, options.tokens.split(",")):
            x = jax.random.normal(jax.random.key(M), (M, K), jnp.bfloat16)
            cases += [(M, x, plan) for plan in ([None] if plain else plans(weight, M, options.sweep))]

        def compiled(case: Any, copies: Any = copies) -> Any:
            M, x, plan = case
            used = copies if M <= 256 else copies[:5]
            dot = lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))
            one = dot if plan is None else lambda x, w: multiply(x, w, jnp.dtype(jnp.bfloat16), plan)
            try:
                return jax.jit(lambda x, many: [one(x, w) for w in many]).lower(x, used).compile(), used
            except Exception:
                return traceback.format_exc(), used

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            compiling = list(pool.map(compiled, cases))
        wanted: dict[int, Any] = {}
        for (M, x, plan), (run, used) in zip(cases, compiling, strict=True):
            what = dict(format=name, M=M, N=N, K=K, kernel=plan and plan.kernel, tile=plan and list(plan.tile))
            try:
                if isinstance(run, str):
                    raise RuntimeError(run)
                if not plain:
                    if M not in wanted:
                        wanted[M] = jax.jit(reference, static_argnums=2)(x, weight, jnp.dtype(jnp.float32))
                    got = run(x, used)[0].astype(jnp.float32)
                    what["error"] = float(jnp.max(jnp.abs(got - wanted[M])) / jnp.max(jnp.abs(wanted[M])))
                took = seconds(run, x, used, repeat=3) / len(used)
                moved = size + 2 * M * (N + K)
                what |= dict(us=took * 1e6, bandwidth=moved / took / limit, fp8_rate=2 * M * N * K / took / FP8_RATE)
            except Exception:
                what["failure"] = traceback.format_exc()
            results.append(what)
            line = [f"{name} {M} x {N} x {K}", str(plan and (plan.kernel, *plan.tile))]
            if "failure" in what:
                line += [what["failure"].strip().splitlines()[-1][:160]]
            else:
                line += [
                    f"{what['us']:.1f} us, {what['bandwidth']:.0%} of copies, {what['fp8_rate']:.1%} of FP8's rate"
                ]
                line += (
                    [f"error {what['error']:.1e}" + ("" if what["error"] < LIMIT else " TOO LARGE")]
                    if not plain
                    else []
                )
            print("  ".join(line), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
