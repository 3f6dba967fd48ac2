"""Activations made FP8 for products: one scale for a token and a group of its inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.matrix import Program, Tile, view
from kernels.cuda.tile import Tiles, launch

FP8_MAX = 448.0
LEAST = 1e-10  # what the largest of a group counts as, at least
ROWS = 32  # of a program, which has one group of their inputs


def narrowed(x: Array) -> tuple[Array, Array]:
    """x [T, G], a group of inputs of some tokens -> the same in FP8, and its scales [T] f32. Within kernels."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=1), LEAST) / FP8_MAX
    x = jnp.clip(x / scale[:, None], -FP8_MAX, FP8_MAX)
    return x.astype(jnp.float8_e4m3fn), scale


def narrow(x: Array, group: int, *, interpret: bool = False) -> tuple[Array, Array]:
    """x [T, K] -> float8_e4m3fn [T, K], scales [K / group, T] f32, in one pass. `group`: a power of two."""
    T, K = x.shape
    tile = Tile(ROWS, group, group)

    def kernel(x: Any, values: Any, scales: Any) -> None:
        program = Program.here(tile, T, K)
        value, scale = narrowed(program.load_x(x, program.columns))
        keep = program.rows < T
        row = jnp.where(keep, program.rows, T)  # past the end, where the interpreter drops what is written
        mask = jnp.broadcast_to(keep[:, None], value.shape)
        plgpu.store(view(values, row, program.columns), value, mask=mask)
        plgpu.store(scales.at[jnp.broadcast_to(program.column, row.shape), row], scale, mask=keep)

    shapes = jax.ShapeDtypeStruct((T, K), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((K // group, T), jnp.float32)
    grid = (pl.cdiv(T, ROWS), K // group, 1)
    return launch(kernel, [x], shapes, grid=grid, tiles=Tiles(ROWS, group, 4, 1), interpret=interpret)
