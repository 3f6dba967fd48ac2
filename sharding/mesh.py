"""The mesh: devices as (data, stage, model), so that those that share a layer are neighbours; and its groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

AXES = ("data", "stage", "model")


class Groups(NamedTuple):
    """Which devices, by their number, work together: each a partition of all of them."""

    tensor: list[list[int]]  # share every layer
    pipeline: list[list[int]]  # hold the same part of every stage
    data: list[list[int]]  # hold the same part of every replica


def device_grid(data: int, stage: int, model: int) -> np.ndarray:
    """-> [data, stage, model] int: arange(world), tensor-parallel ranks adjacent, replicas furthest apart."""
    return np.arange(data * stage * model).reshape(data, stage, model)


def groups(tensor_parallel: int, pipeline_parallel: int = 1, data_parallel: int = 1) -> Groups:
    """-> the groups of a mesh with these sizes. With TP 2 and PP 4 on 8 devices: 4 tensor groups, 2 pipeline groups."""
    grid = device_grid(data_parallel, pipeline_parallel, tensor_parallel)
    along = lambda axis: np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis]).tolist()
    return Groups(along(2), along(1), along(0))


def replica_meshes(
    devices: Sequence[Any], tensor_parallel: int, pipeline_parallel: int = 1, data_parallel: int = 1
) -> list[Mesh]:
    """-> for each replica the mesh (stage, model) of its devices, the first of `devices` for the first replica.

    Errors: ValueError if there are fewer devices than the product of the sizes.
    """
    grid = device_grid(data_parallel, pipeline_parallel, tensor_parallel)
    if grid.size > len(devices):
        raise ValueError(
            f"tensor_parallel_size {tensor_parallel} x pipeline_parallel_size {pipeline_parallel} x data_parallel_size "
            f"{data_parallel}: needs {grid.size} devices, and there are {len(devices)}; lower one of them"
        )
    return [Mesh(np.array(devices, dtype=object)[replica], AXES[1:]) for replica in grid]
