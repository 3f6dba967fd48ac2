"""XLA's compiler for an H200 that is not here: what gpu_products.py and gpu_steps.py have in common.

pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm   # of JAX's own version
"""

from __future__ import annotations

import os
import sysconfig
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

CUDA = f"{sysconfig.get_path('purelib')}/nvidia/cu13"  # where ptxas lies, in bin
MULTIPROCESSORS = 132
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


def choose(cuda: str) -> None:
    """Tell XLA where CUDA's compiler lies. To be called before JAX is imported."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        XLA_FLAGS=f"--xla_gpu_cuda_data_dir={cuda}",
        PATH=f"{cuda}/bin:{os.environ['PATH']}",
    )


def h200() -> tuple[Mesh, AbstractMesh]:
    """-> the card as a mesh of the engine's axes, and what `jax.sharding.use_abstract_mesh` takes: Pallas asks it."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

    from kernels.cuda import product
    from sharding.mesh import AXES

    product.on_hopper = lambda: True
    product.multiply = partial(product.multiply, multiprocessors=MULTIPROCESSORS)
    topology = topologies.get_topology_desc("", "cuda", target_config=H200, topology="1x1x1")
    device = AbstractDevice("NVIDIA H200", MULTIPROCESSORS, "gpu")
    mesh = Mesh(np.array(topology.devices).reshape((1,) * len(AXES)), AXES)
    return mesh, AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
