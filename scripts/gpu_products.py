"""Compile products with quantized weights for an H200 that is not here: registers, shared memory and types show.

    python scripts/gpu_products.py [--formats fp8_block,int4] [--tokens 8,64,128] [--cuda FOLDER]

Shapes are Llama-8B's, plans the default ones. gpu_compiler.py says what to install; FOLDER is where ptxas lies, in
bin. Exit code 1 if something does not compile. Triton's kernels and XLA's are compiled to the end; Mosaic's is when it
is first run, too.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from typing import Any

import gpu_compiler

OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}  # as the engine's steps have them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="fp8_block,fp8,int8_w8a8,int8,q8_0,int4,int4_32,mxfp4,q4_k,q6_k")
    parser.add_argument("--tokens", default="8,64,128,4096")
    parser.add_argument("--cuda", default=gpu_compiler.CUDA)
    options = parser.parse_args()
    gpu_compiler.choose(options.cuda)

    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from product_cases import LLAMA_8B, random_weight

    from kernels.cuda import product

    mesh, abstract = gpu_compiler.h200()
    there = NamedSharding(mesh, PartitionSpec())
    bfloat16 = jnp.dtype(jnp.bfloat16)
    given = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), tree)

    def compile_one(name: str, M: int, N: int, K: int) -> Any:
        """-> the plan. Errors: what the compiler says."""
        weight = jax.eval_shape(partial(random_weight, name, N, K))
        plan = product.default_plan(weight, M)
        run = partial(product.multiply, dtype=bfloat16, plan=plan)
        with jax.sharding.use_abstract_mesh(abstract):  # Pallas asks it which GPU it is
            traced = jax.jit(run).trace(given(jax.ShapeDtypeStruct((M, K), bfloat16)), given(weight))
            lowered = traced.lower(lowering_platforms=("cuda",))
        lowered.compile(OPTIONS)
        return plan

    failed = 0
    cases = itertools.product(options.formats.split(","), map(int, options.tokens.split(",")), LLAMA_8B)
    for name, M, (N, K) in cases:
        try:
            plan = compile_one(name, M, N, K)
            print(f"{name} {M} x {N} x {K}: {plan.kernel} {tuple(plan.tile)}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{name} {M} x {N} x {K}: {str(error)[:300]}", flush=True)
    print(f"{failed} not compiled")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
