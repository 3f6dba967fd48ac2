"""What the GPU's products with quantized weights share: how one is cut into programs, and their launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.tile import Tiles, launch

SHARED_MEMORY = 227 << 10  # bytes of a multiprocessor that a program may have
FEW_OUTPUTS = 8192  # of which whole tiles are fewer than a large GPU's multiprocessors


class Tile(NamedTuple):
    """A program's part of a product: rows of x, columns of the result, inputs of one turn, all powers of two.

    `splits`: programs that share a sum over the inputs. `swapped`: the weight comes first in the product, which gives
    the tensor cores' long side to it: a few rows are the short one.
    """

    rows: int
    columns: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of a program's result."""
        return (self.columns, self.rows) if self.swapped else (self.rows, self.columns)


class Groups(NamedTuple):
    """Rows of x that are sorted by group, each of which has outputs of its own: so many rows of the weight."""

    blocks: Array  # [3, B] i32: of each program's rows their group, the first, and how many; of none 0
    number: int

    def outputs(self, weight: Array) -> int:
        """-> how many rows of the weight each group has."""
        return weight.shape[0] // self.number


class Program(NamedTuple):
    """The part of one program: its rows and columns of the result, and where those of the weight begin."""

    tile: Tile
    rows: Array  # [rows]
    count: Array | None  # how many of the rows there are; None: all
    columns: Array  # [columns], the last repeated past the end
    group: Array | None  # of the rows; None: all share the weight
    split: Array
    column: Array  # number of its tile
    width: int  # columns of the result

    @staticmethod
    def here(tile: Tile, rows: int, columns: int, blocks: Any = None) -> Program:
        """The one that runs, of a result [rows, columns]. blocks: a ref of those of `Groups`."""
        row, column, split = (pl.program_id(axis) for axis in range(3))
        member = jnp.arange(tile.rows, dtype=jnp.int32)
        if blocks is None:
            group, start = None, row * tile.rows
            count = None if rows % tile.rows == 0 else rows - start
        else:
            group, start, count = (blocks[i, row] for i in range(3))
        across = jnp.minimum(column * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32), columns - 1)
        return Program(tile, start + member, count, across, group, split, column, columns)

    @property
    def used(self) -> Array | None:
        """-> which rows there are, [rows] bool; None: all."""
        return None if self.count is None else jnp.arange(self.tile.rows, dtype=jnp.int32) < self.count

    @property
    def first(self) -> Array | int:
        """-> the weight's row for column 0."""
        return 0 if self.group is None else self.group * self.width

    @property
    def outputs(self) -> Array:
        """-> the weight's rows for the columns, [columns]."""
        return self.first + self.columns

    def turns(self, count: int) -> Array | int:
        """-> so many, or none for a program of no rows, which only groups have."""
        return (
            count
            if self.group is None or self.count is None
            else jnp.where(self.count > 0, jnp.int32(count), jnp.int32(0))
        )

    def load_x(self, ref: Any, at: Array) -> Array:
        """-> x's elements [rows, at], zeros in rows that are not there: those cost no memory traffic."""
        used = self.used
        if used is None:
            return plgpu.load(view(ref, self.rows, at))
        mask = jnp.broadcast_to(used[:, None], (self.tile.rows, at.shape[0]))
        zero = 0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0
        return plgpu.load(view(ref, self.rows, at), mask=mask, other=zero)

    def dot(self, x: Array, weight: Array, total: Array | None = None) -> Array:
        """x [rows, D], weight [columns, D] -> [rows, columns] float32 or int32, or that transposed if swapped."""
        first, second = (weight, x) if self.tile.swapped else (x, weight)
        wide = jnp.int32 if weight.dtype == jnp.int8 else jnp.float32
        return lax.dot_general(first, second, (((1,), (1,)), ((), ())), preferred_element_type=jnp.dtype(wide))

    def by_row(self, x: Array) -> Array:
        """x [rows] -> as the result lies, broadcastable to it."""
        return x[None, :] if self.tile.swapped else x[:, None]

    def by_column(self, x: Array) -> Array:
        return x[:, None] if self.tile.swapped else x[None, :]

    def store(self, ref: Any, total: Array) -> None:
        """Write the result to ref [splits, M, N]. What is not there goes nowhere."""
        across = self.column * self.tile.columns + jnp.arange(self.tile.columns, dtype=jnp.int32)
        row, column = (jnp.broadcast_to(x, total.shape) for x in (self.by_row(self.rows), self.by_column(across)))
        keep, used = column < self.width, self.used
        if used is not None:
            keep &= jnp.broadcast_to(self.by_row(used), total.shape)
        row = jnp.where(keep, row, ref.shape[1])  # an index past the end, where the interpreter drops what is written
        plgpu.store(ref.at[self.split, row, column], total.astype(ref.dtype), mask=keep)


def view(ref: Any, rows: Array, columns: Array) -> Any:
    """-> a view of ref [N, M] at rows [R] and columns [C]: [R, C]."""
    shape = (rows.shape[0], columns.shape[0])
    return ref.at[jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)]


def launch_product(
    kernel: Callable[..., None],
    inputs: Sequence[Array],
    shape: tuple[int, int],
    dtype: jnp.dtype,
    tile: Tile,
    interpret: bool,
    groups: Groups | None = None,
) -> Array:
    """Run kernel(program, *refs) for every tile of a result [M, N], whose ref is [splits, M, N] -> [M, N] in `dtype`.

    Programs that share columns come together, so that a weight is read once. XLA adds up splits, which are float32.
    """
    rows, columns = shape
    blocks = [] if groups is None else [groups.blocks]
    down = pl.cdiv(rows, tile.rows) if groups is None else groups.blocks.shape[1]

    def run(*refs: Any) -> None:
        kernel(Program.here(tile, rows, columns, *refs[: len(blocks)]), *refs[len(blocks) :])

    out = jax.ShapeDtypeStruct((tile.splits, *shape), dtype if tile.splits == 1 else jnp.float32)
    tiles = Tiles(tile.rows, tile.depth, tile.warps, tile.stages)
    grid = (down, pl.cdiv(columns, tile.columns), tile.splits)
    y = launch(run, [*blocks, *inputs], out, grid=grid, tiles=tiles, interpret=interpret)
    return summed(y, dtype)


def summed(parts: Array, dtype: jnp.dtype) -> Array:
    """parts [splits, M, N], float32 if there are several -> their sum [M, N] in `dtype`."""
    return parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0).astype(dtype)
