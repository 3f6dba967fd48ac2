"""From host memory to jax.Arrays: the shards of a parameter that this host's devices hold, filled and sent on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

ALIGNMENT = 64  # bytes; memory that is aligned so becomes a CPU device's array as it is, without a copy


class Shard(NamedTuple):
    """Memory for parameter[corner[0] : corner[0] + array.shape[0], ...]."""

    array: np.ndarray
    corner: tuple[int, ...]


class Arrivals:
    """Makes arrays on devices; keeps host memory for what is still on its way there below `limit` bytes.

    One parameter may always be on its way, however large it is.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._on_the_way: deque[jax.Array] = deque()

    def make(
        self, shape: tuple[int, ...], dtype: str, sharding: Sharding | None, fill: Callable[[Sequence[Shard]], None]
    ) -> jax.Array:
        """-> an array [*shape] with this sharding (None: on the default device), whose shards `fill` has written."""
        places = sharding.addressable_devices_indices_map(shape) if sharding else {None: (slice(None),) * len(shape)}
        bounds = {device: _bounds(index, shape) for device, index in places.items()}
        sizes = {bound: [high - low for low, high in bound] for bound in bounds.values()}
        count = sum(math.prod(size) for size in sizes.values()) * jnp.dtype(dtype).itemsize
        self._make_room(count)
        shards = {b: Shard(aligned(size, jnp.dtype(dtype)), tuple(low for low, _ in b)) for b, size in sizes.items()}
        fill(list(shards.values()))
        arrays = [jax.device_put(shards[bound].array, device) for device, bound in bounds.items()]
        made = arrays[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, arrays)
        self._on_the_way.append(made)
        return made

    def _make_room(self, count: int) -> None:
        while self._on_the_way and count + sum(_host_bytes(array) for array in self._on_the_way) > self._limit:
            self._on_the_way.popleft().block_until_ready()


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """-> an array [*shape] with nothing in it yet, which begins at a multiple of ALIGNMENT."""
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + count].view(dtype).reshape(shape)


def _bounds(index: tuple[slice, ...] | None, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """-> first and end along each axis."""
    return tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))


def _host_bytes(array: jax.Array) -> int:
    return sum(shard.data.nbytes for shard in array.addressable_shards)
