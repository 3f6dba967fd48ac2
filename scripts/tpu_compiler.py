"""The real TPU compiler on a machine without a TPU. Import it before JAX, which reads the environment when it loads."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple


class Generation(NamedTuple):
    """Per JAX device: a chip, but for v7x one of its two cores. The clock is peak FLOP/s over those of a cycle.

    A cycle is worth 2 * MXUs * width^2 FLOP, and twice that from v6e on.
    """

    topology: str
    bandwidth: float  # bytes/s of HBM
    flops: float  # bf16
    clock: float  # Hz
    cores: int  # of which a kernel uses one


GENERATIONS = {
    "v4": Generation("v4:2x2x1", 1.23e12, 275e12, 1.05e9, 2),
    "v5e": Generation("v5e:2x4", 0.82e12, 197e12, 1.5e9, 1),
    "v5p": Generation("v5p:2x2x1", 2.76e12, 459e12, 1.75e9, 2),
    "v6e": Generation("v6e:2x4", 1.64e12, 918e12, 1.75e9, 1),
    "v7x": Generation("tpu7x:2x2x1", 3.7e12, 1153e12, 2.2e9, 1),
}

# Without the last flag the compiler writes down its 70 passes too, and takes twice as long.
FINAL_SCHEDULES = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"


def prepare(dump: Path | None = None) -> None:
    """Set what JAX and the TPU compiler read. `dump`: where the compiler shall put its final schedules."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        ALLOW_MULTIPLE_LIBTPU_LOAD="true",
        LIBTPU_INIT_ARGS=FINAL_SCHEDULES.format(dump) if dump else "",
    )


def mesh_of(generation: str, size: int = 1) -> Any:
    """-> a mesh of so many of the generation's devices, along "model"."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    topology = topologies.get_topology_desc(platform="tpu", topology_name=GENERATIONS[generation].topology)
    return Mesh(np.array(topology.devices[:size]), ("model",))


def compile_for(
    mesh: Any, jitted: Any, static: tuple[Any, ...], arguments: Any, options: dict[str, Any] | None = None
) -> tuple[Any, float]:
    """jitted(*static, *arguments), where arguments are trees of shapes -> the executable and the seconds it took.

    A shape without a sharding is on every device of the mesh. `options`: the compiler's.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = lambda a: a if a.sharding else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere)
    shapes = jax.tree.map(placed, arguments)
    started = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it which generation it is
        lowered = jitted.trace(*static, *shapes).lower()
    return lowered.compile(options), time.perf_counter() - started
