"""From whole parameters, drawn or stored as such, to their `Placed` arrays: padded and stacked on the mesh itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from engine.models.config import ModelConfig
from engine.models.params import Params, ParamSpec, map_specs, param_specs
from engine.models.placement import Path, Placed, map_placed


def random_params(
    config: ModelConfig,
    dtype: str,
    seed: int,
    placed: Params,
    keep: Callable[[Placed, jax.Array], Any] = lambda placed, array: array,
) -> Params:
    """-> parameters drawn from N(0, 1 / fan_in), norms ones: the same values however they are placed.

    `keep`(placed, array) says what to keep of each, if not itself.
    """
    paths: list[Path] = []
    map_specs(lambda path, spec: paths.append(path), param_specs(config))
    keys = dict(zip(paths, jax.random.split(jax.random.key(seed), len(paths)), strict=True))

    def draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
        kind = spec.dtype or dtype
        if not spec.fan_in:
            return jnp.ones(spec.shape, kind)
        return jax.random.normal(key, spec.shape, kind) * jnp.asarray(1 / math.sqrt(spec.fan_in), kind)

    @cache  # one executable for all layers that are alike
    def maker(placed: Placed) -> Callable[..., jax.Array]:
        make = lambda *keys: _relay(placed, [draw(placed.spec, key) for key in keys])
        return jax.jit(make, out_shardings=placed.sharding)

    def one(placed: Placed) -> jax.Array:
        present = [path for path in placed.sources if path is not None]
        return keep(placed, maker(_anonymous(placed))(*(keys[path] for path in present)))

    return map_placed(one, placed)


def stored_sharding(placed: Params) -> dict[Path, Sharding | None]:
    """-> for each of the model's parameters where it may lie before it is laid out by `laid_out`."""
    found: dict[Path, Sharding | None] = {}

    def one(placed: Placed) -> None:
        for path in placed.sources:
            if path is not None:
                found[path] = placed.sharding if placed.is_plain else _spread(placed)

    map_placed(one, placed)
    return found


def laid_out(sources: Mapping[Path, jax.Array], placed: Params) -> Params:
    """-> the parameters as placed, made of whole ones."""

    @cache
    def maker(placed: Placed) -> Callable[..., jax.Array]:
        return jax.jit(lambda *parts: _relay(placed, list(parts)), out_shardings=placed.sharding)

    def one(placed: Placed) -> jax.Array:
        present = [sources[path] for path in placed.sources if path is not None]
        return present[0] if placed.is_plain else maker(_anonymous(placed))(*present)

    return map_placed(one, placed)


def _anonymous(placed: Placed) -> Placed:
    """-> the same for whatever layers it is of."""
    return replace(
        placed, sources=tuple(None if path is None else (stage,) for stage, path in enumerate(placed.sources))
    )


def _relay(placed: Placed, present: list[jax.Array]) -> jax.Array:
    """-> the array, made of its sources that are present. For the inside of a jitted function."""
    if placed.is_plain:
        return present[0]
    of = dict(zip([path for path in placed.sources if path is not None], present, strict=True))
    out = jnp.zeros(placed.shape, present[0].dtype)
    for path, corner, at in placed.pieces([0] * len(placed.shape), placed.shape):
        inner = at[1:] if placed.stacked else at
        box = tuple(slice(low, low + part.stop - part.start) for low, part in zip(corner, inner, strict=True))
        value = of[path][box]
        out = out.at[at].set(value[None] if placed.stacked else value)
    return out


def _spread(placed: Placed) -> Sharding:
    """-> a sharding that splits the parameter's largest axis that all devices divide."""
    assert isinstance(placed.sharding, NamedSharding)
    mesh = placed.sharding.mesh
    fitting = [(size, axis) for axis, size in enumerate(placed.spec.shape) if size % mesh.size == 0]
    axis = max(fitting)[1] if fitting else None
    names: list[Any] = [None] * len(placed.spec.shape)
    if axis is not None:
        names[axis] = mesh.axis_names
    return NamedSharding(mesh, PartitionSpec(*names))
