"""Hopper's products with packed weights against the reference, on the card itself: formats, batches and tiles.

    python scripts/check_products.py [--formats int8,int4] [--tokens 1,64] [--splits 1,4]

Prints each case's relative error (largest difference over the largest value); exit code 1 if one is over its limit.
bench_products.py times the tiles that are the engine's, tune_kernels.py --trials others.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from product_cases import LIMIT, random_weight, relative_error, tokens_of, wanted

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernels.cuda import hopper_packed
from kernels.cuda.matrix import Tile
from kernels.cuda.product import Plan, multiply
from kernels.quantized import Layout, QuantizedTensor, quantize

SHAPE = (768, 2048)
FORMATS = ("int8", "q8_0", "int4", "int4_32", "int4_zeros", "int4_channel", "int4_half")
TOKENS = (1, 7, 64, 200)


def weight_of(name: str, N: int, K: int) -> QuantizedTensor:
    """-> a weight of one of FORMATS."""
    if name == "int4_channel":
        return quantize(jax.random.normal(jax.random.key(1), (N, K)), Layout("int4", split=128))
    weight = random_weight({"int4_zeros": "int4", "int4_half": "int4"}.get(name, name), N, K)
    if name == "int4_half":
        return replace(weight, scales=weight.scales.astype(jnp.float16))
    if name == "int4_zeros":
        zeros = jax.random.bits(jax.random.key(2), weight.scales.shape, jnp.uint8) % 17
        return replace(weight, zeros=zeros)
    return weight


def checked(M: int, weight: QuantizedTensor, splits: list[int]) -> list[Tile]:
    """-> tiles of a weight for M tokens: few and many warpgroups, sums in one program and in several."""
    rows = next((rows for rows in hopper_packed.ROWS if rows >= M), hopper_packed.ROWS[-1])
    found = []
    for split, (columns, warps) in itertools.product(splits, hopper_packed.WIDTHS):
        tiles = [Tile(rows, columns, hopper_packed.DEPTH, split, warps, stages) for stages in hopper_packed.STAGES]
        found += [tile for tile in tiles if hopper_packed.fits(weight, tile)][:1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--splits", default="1,2,4")
    options = parser.parse_args()
    splits = list(map(int, options.splits.split(",")))
    (N, K), failures, cases = SHAPE, 0, 0
    for name, M in itertools.product(options.formats.split(","), map(int, options.tokens.split(","))):
        weight = weight_of(name, N, K)
        x = tokens_of(M, K)[0]
        expected = wanted(x, weight)
        for tile in checked(M, weight, splits):
            plan, cases = Plan("hopper_packed", tile), cases + 1
            run: Any = lambda x, w, plan=plan: multiply(x, w, jnp.dtype(jnp.bfloat16), plan)
            head = f"{name} {M} x {N} x {K} {tuple(tile)}"
            try:
                error = relative_error(jax.jit(run)(x, weight), expected)
            except Exception:
                failures += 1
                print(f"{head}: {traceback.format_exc().strip().splitlines()[-1][:200]}", flush=True)
                continue
            failures += not error < LIMIT
            print(f"{head}: error {error:.1e}{'' if error < LIMIT else ' TOO LARGE'}", flush=True)
    print(f"{cases} cases, {failures} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
