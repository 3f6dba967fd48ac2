"""Compile products with quantized weights for an H200 that is not here: registers, shared memory and types show.

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm   # of JAX's own version
    python scripts/gpu_products.py [--formats fp8_block,int4] [--tokens 8,64,128] [--cuda FOLDER]

Shapes are Llama-8B's, plans the default ones. FOLDER is where ptxas lies, in bin. Exit code 1 if something does not
compile. Triton's kernels and XLA's are compiled to the end; Mosaic's is when it is first run, too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import sysconfig
from functools import partial
from typing import Any

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  device_address_bits: 64 device_vendor: "NVIDIA Corporation" name: "NVIDIA H200"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.1"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 1 }
"""
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}  # as the engine's steps have them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="fp8_block,fp8,int8_w8a8,int8,q8_0,int4,int4_32,mxfp4,q4_k,q6_k")
    parser.add_argument("--tokens", default="8,64,128,4096")
    parser.add_argument("--cuda", default=f"{sysconfig.get_path('purelib')}/nvidia/cu13")
    options = parser.parse_args()
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        XLA_FLAGS=f"--xla_gpu_cuda_data_dir={options.cuda}",
        PATH=f"{options.cuda}/bin:{os.environ['PATH']}",
    )

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
    from product_cases import LLAMA_8B, random_weight

    from kernels.cuda import product

    product.on_hopper = lambda: True
    topology = topologies.get_topology_desc("", "cuda", target_config=H200, topology="1x1x1")
    there = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())
    abstract = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
    bfloat16 = jnp.dtype(jnp.bfloat16)
    given = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), tree)

    def compile_one(name: str, M: int, N: int, K: int) -> Any:
        """-> the plan. Errors: what the compiler says."""
        weight = jax.eval_shape(partial(random_weight, name, N, K))
        plan = product.default_plan(weight, M)
        run = partial(product.multiply, dtype=bfloat16, plan=plan, multiprocessors=132)
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
