"""Compile products with quantized weights for TPUs that are not here: that they fit, and what memory they need.

    python scripts/tpu_products.py [--generations v5e,v6e,v7x] [--formats int8,fp8_block] [--tokens 8,2048] [--out FILE]

Shapes are Llama-8B's. `temporaries` are bytes of HBM besides arguments and result. An unpacked copy of a weight, were
there one, would be at least as large as the weight: exit code 1 if temporaries are, or if something does not compile.
--few: what tests run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import tpu_compiler

tpu_compiler.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from product_cases import LLAMA_8B, random_weight  # noqa: E402

from kernels.pallas.product import matrix_product, supports  # noqa: E402

FORMATS = ("int8", "int8_w8a8", "fp8", "fp8_block", "int4")
FEW = (
    ("v5e", "int8_w8a8", 8),
    ("v6e", "fp8_block", 8),
    ("v6e", "int4", 512),
    ("v7x", "fp8_block", 8),
    ("v7x", "fp8", 512),
)


def measure(generation: str, name: str, tokens: int, shape: tuple[int, int]) -> dict[str, Any]:
    """-> a case, and what the compiler says of it."""
    N, K = shape
    weight = jax.eval_shape(partial(random_weight, name, N, K))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    row = {"generation": generation, "format": name, "tokens": tokens, "N": N, "K": K, "weight": size}
    run = jax.jit(partial(matrix_product, dtype=jnp.dtype(jnp.bfloat16)))
    x = jax.ShapeDtypeStruct((tokens, K), jnp.bfloat16)
    assert supports(weight) is None, supports(weight)
    try:
        compiled, took = tpu_compiler.compile_for(tpu_compiler.mesh_of(generation), run, (), (x, weight))
    except Exception as error:
        return row | {"error": str(error)[:500]}
    return row | {"temporaries": compiled.memory_analysis().temp_size_in_bytes, "seconds": round(took, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", default="v5e,v6e,v7x")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="8,2048")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    some = itertools.product(
        options.generations.split(","), options.formats.split(","), map(int, options.tokens.split(","))
    )
    shapes = LLAMA_8B[1:2] if options.few else LLAMA_8B
    rows = []
    for (generation, name, tokens), shape in itertools.product(FEW if options.few else some, shapes):
        rows.append(measure(generation, name, tokens, shape))
        print(json.dumps(rows[-1]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    failed = sum("error" in row for row in rows)
    share = max((row["temporaries"] / row["weight"] for row in rows if "error" not in row), default=0.0)
    print(f"{len(rows)} products, {failed} not compiled; temporaries are {share:.1%} of a weight at most")
    sys.exit(failed > 0 or share >= 1)


if __name__ == "__main__":
    main()
