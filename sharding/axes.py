"""The mesh as code inside `jax.shard_map` sees it: the collectives along an axis, and none where it has one device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh
from jax.tree_util import register_dataclass


class Link(Protocol):
    """What adds up small arrays of devices that reach each other's memory; a tree of arrays."""

    def supports(self, x: Array) -> bool: ...

    def sum(self, x: Array) -> Array: ...

    def supports_norm(self, x: Array) -> bool: ...

    def sum_and_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]: ...


@partial(register_dataclass, data_fields=["link"], meta_fields=["names", "size"])
@dataclass(frozen=True)
class Axis:
    """One axis of a mesh, or several as one. Every method is the identity where there is one device.

    `link`: what sums go through that it supports; all others are XLA's.
    """

    names: tuple[str, ...] = ()
    size: int = 1
    link: Link | None = None

    def index(self) -> Array | int:
        """-> this device's place along the axis."""
        return lax.axis_index(self.names) if self.size > 1 else 0

    def sum(self, x: Array) -> Array:
        """-> the sum of every device's x, on each."""
        if self.size == 1:
            return x
        if self.link is not None and self.link.supports(x):
            return self.link.sum(x)
        return lax.psum(x, self.names)

    def pick(self, x: Array) -> Array:
        """x [R, ...], the same on each -> [R / size, ...]: this device's rows. `size` must divide R."""
        if self.size == 1:
            return x
        count = x.shape[0] // self.size
        return lax.dynamic_slice_in_dim(x, self.index() * count, count)

    def gather(self, x: Array, axis: int = 0) -> Array:
        """x [R, ...] -> [R * size, ...]: every device's rows (or entries of another axis) in order."""
        return lax.all_gather(x, self.names, axis=axis, tiled=True) if self.size > 1 else x

    def exchange(self, x: Array) -> Array:
        """x [R, C], every row's columns spread over the devices -> [R / size, C * size]: whole rows, spread instead."""
        return lax.all_to_all(x, self.names, 0, 1, tiled=True) if self.size > 1 else x

    def onward(self, x: Array) -> Array:
        """-> x of the device before this one; zeros on the first."""
        return lax.ppermute(x, self.names, [(i, i + 1) for i in range(self.size - 1)]) if self.size > 1 else x

    def only(self, x: Array, place: int) -> Array:
        """-> x of the device at this place, on each."""
        return self.sum(jnp.where(self.index() == place, x, jnp.zeros_like(x))) if self.size > 1 else x

    def last(self, x: Array) -> Array:
        """-> the last device's x, on each."""
        return self.only(x, self.size - 1)


@partial(register_dataclass, data_fields=["model", "stage"], meta_fields=["micro_batches"])
@dataclass(frozen=True)
class Axes:
    """Along `model` devices share each layer, along `stage` they hold one group of layers after another.

    `micro_batches`: into how many parts a step's tokens are cut, so that all stages have something to do, or so that
    devices of one stage compute while they add up.
    """

    model: Axis = Axis()
    stage: Axis = Axis()
    micro_batches: int = 1

    @property
    def is_overlapped(self) -> bool:
        """Whether the parts are there for devices of one stage to compute one while they add up another."""
        return self.stage.size == 1 and self.micro_batches > 1

    @cached_property
    def whole(self) -> Axis:
        """-> both as one."""
        if self.stage.size == 1:
            return self.model
        return Axis(self.stage.names + self.model.names, self.stage.size * self.model.size)


ALONE = Axes()


def axes_of(mesh: Mesh, micro_batches: int = 1) -> Axes:
    """-> the axes of a mesh (stage, model)."""
    named = {name: Axis((name,) if mesh.shape[name] > 1 else (), mesh.shape[name]) for name in ("model", "stage")}
    return Axes(**named, micro_batches=micro_batches)
