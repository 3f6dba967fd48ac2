"""Grouped products on NVIDIA GPUs: one program for a block of rows of one group and a tile of the result's columns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.tile import Tiles, launch


class Tile(NamedTuple):
    """A program's shape: rows, columns, depth of one turn, warps, stages of its pipeline. Powers of two but stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def choose_tile(rows: int, groups: int, dtype: jnp.dtype) -> Tile:
    """-> the tile for groups of this average size; 16 rows are the least that a tensor core takes.

    Few rows a group are bound by the weights' bytes, so that a tall tile would waste products on rows of no group.
    """
    if dtype.itemsize == 4:
        return Tile(16, 64, 32, 4, 2)
    average = rows // groups
    if average <= 16:
        return Tile(16, 64, 128, 4, 4)
    return Tile(64, 128, 64, 4, 3) if average <= 64 else Tile(128, 128, 64, 8, 3)


def row_blocks(sizes: Array, rows: int, block: int) -> Array:
    """Cut groups of sorted rows into blocks. sizes [E] i32 -> [3, N] i32: a block's group, first row and rows, or 0.

    N is a bound for every division of `rows` rows among the groups.
    """
    groups = sizes.shape[0]
    number = pl.cdiv(rows, block) + min(groups, rows)
    ends = jnp.cumsum(pl.cdiv(sizes, block))
    index = jnp.arange(number, dtype=jnp.int32)
    group = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, groups - 1)
    offset = (index - ends[group] + pl.cdiv(sizes[group], block)) * block
    count = jnp.where(index < ends[-1], jnp.minimum(sizes[group] - offset, block), 0)
    return jnp.stack([group, (jnp.cumsum(sizes) - sizes)[group] + offset, count]).astype(jnp.int32)


def grouped_dot(x: Array, weight: Array, sizes: Array, *, tile: Tile | None = None, interpret: bool = False) -> Array:
    """See kernels.grouped.grouped_dot."""
    rows, depth = x.shape
    groups, _, columns = weight.shape
    tile = tile or choose_tile(rows, groups, x.dtype)
    blocks = row_blocks(sizes, rows, tile.rows)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    grid = (blocks.shape[1], pl.cdiv(columns, tile.columns))  # neighbours share a group's tile: it stays in the cache

    def kernel(blocks: Any, x: Any, weight: Any, out: Any) -> None:
        index, column = pl.program_id(0), pl.program_id(1) * tile.columns
        group, first, count = (blocks[i, index] for i in range(3))
        member = jnp.arange(tile.rows, dtype=jnp.int32)
        row = first + jnp.minimum(member, jnp.maximum(count - 1, 0))  # those past the block's end repeat the last
        at_columns = column + jnp.arange(tile.columns, dtype=jnp.int32)
        inside = at_columns < columns

        def turn(i: Array, total: Array) -> Array:
            at = i * tile.depth + jnp.arange(tile.depth, dtype=jnp.int32)
            within = at < depth
            a = _load(x, row, at, None if depth % tile.depth == 0 else within[None, :])
            whole = depth % tile.depth == 0 and columns % tile.columns == 0
            deep = jnp.where(within, group * depth + at, 0)
            b = _load(weight, deep, at_columns, None if whole else within[:, None] & inside[None, :])
            return total + lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)

        turns = jnp.where(count > 0, jnp.int32(pl.cdiv(depth, tile.depth)), jnp.int32(0))
        total = lax.fori_loop(0, turns, turn, jnp.zeros((tile.rows, tile.columns), jnp.float32))
        used = member < count
        view = _elements(out, jnp.where(used, row, rows), at_columns)
        plgpu.store(view, total.astype(out.dtype), mask=used[:, None] & inside[None, :])

    shape = jax.ShapeDtypeStruct((rows, columns), x.dtype)
    inputs = [blocks, x, weight.reshape(groups * depth, columns)]
    tiles = Tiles(tile.rows, tile.depth, tile.warps, tile.stages)
    return launch(kernel, inputs, shape, grid=grid, tiles=tiles, interpret=interpret)


def _elements(ref: Any, rows: Array, columns: Array) -> Any:
    """-> a view of ref [N, M] at rows [R] and columns [C]: [R, C]."""
    shape = (rows.shape[0], columns.shape[0])
    return ref.at[jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)]


def _load(ref: Any, rows: Array, columns: Array, mask: Array | None) -> Array:
    """-> ref's elements [R, C], zeros where the mask says no."""
    view = _elements(ref, rows, columns)
    if mask is None:
        return plgpu.load(view)
    return plgpu.load(view, mask=jnp.broadcast_to(mask, (rows.shape[0], columns.shape[0])), other=0)
