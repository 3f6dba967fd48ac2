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


class Program(NamedTuple):
    """The part of one program: its rows and columns [rows], [columns], the last repeated past the end."""

    tile: Tile
    rows: Array
    columns: Array
    split: Array
    row_end: int
    column: Array  # number of its tile

    @staticmethod
    def here(tile: Tile, rows: int, columns: int) -> Program:
        row, column, split = (pl.program_id(axis) for axis in range(3))
        at = row * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
        across = column * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32)
        return Program(tile, at, jnp.minimum(across, columns - 1), split, rows, column)

    def load_x(self, ref: Any, at: Array) -> Array:
        """-> x's elements [rows, at], zeros in rows past the end: those cost no memory traffic."""
        if self.row_end % self.tile.rows == 0:
            return plgpu.load(view(ref, self.rows, at))
        mask = jnp.broadcast_to(self.rows[:, None] < self.row_end, (self.tile.rows, at.shape[0]))
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

    def store(self, ref: Any, total: Array, columns: int) -> None:
        """Write the result to ref [splits, M, N]. Writes past the end go nowhere."""
        across = self.column * self.tile.columns + jnp.arange(self.tile.columns, dtype=jnp.int32)
        row, column = (jnp.broadcast_to(x, total.shape) for x in (self.by_row(self.rows), self.by_column(across)))
        keep = (row < self.row_end) & (column < columns)
        row = jnp.where(keep, row, self.row_end)  # an index past the end, where the interpreter drops what is written
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
) -> Array:
    """Run a kernel for every tile of a result [M, N], whose ref is [splits, M, N] -> [M, N] in `dtype`.

    Programs that share columns come together, so that a weight is read once. XLA adds up splits, which are float32.
    """
    rows, columns = shape
    grid = (pl.cdiv(rows, tile.rows), pl.cdiv(columns, tile.columns), tile.splits)
    out = jax.ShapeDtypeStruct((tile.splits, *shape), dtype if tile.splits == 1 else jnp.float32)
    tiles = Tiles(tile.rows, tile.depth, tile.warps, tile.stages)
    y = launch(kernel, inputs, out, grid=grid, tiles=tiles, interpret=interpret)
    return summed(y, dtype)


def summed(parts: Array, dtype: jnp.dtype) -> Array:
    """parts [splits, M, N], float32 if there are several -> their sum [M, N] in `dtype`."""
    return parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0).astype(dtype)
