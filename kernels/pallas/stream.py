"""Pages of KV on their way from HBM to VMEM: started ahead, across blocks, turns and rows, in order of use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas.layout import Layout

ROW, TURN, BLOCK, STARTED, TAKEN = range(5)  # of Stream.cursor


def stream_types(layout: Layout, slots: int, tables: int, pages: int, dtype: Any, block: int) -> tuple[Any, ...]:
    """-> the scratch memory of a Stream's fields from `buffer` to `cursor`, for rows of up to `pages` pages."""
    return (
        pltpu.VMEM((slots, layout.channels, block, layout.lanes), dtype),
        pltpu.SemaphoreType.DMA((slots,)),
        pltpu.SMEM((tables, 1, pages), jnp.int32),
        pltpu.SemaphoreType.DMA((tables,)),
        pltpu.SMEM((5,), jnp.int32),
    )


UNROLLED = 16  # copies that are written out one by one, so that their scalar work hides behind vector work


def for_each(count: Array, most: int, do: Callable[[Any], None]) -> None:
    """do(i) for i below `count`, which is `most` at most."""
    if most > UNROLLED:
        pl.loop(0, count)(do)
        return
    for i in range(most):
        pl.when(i < count)(partial(do, i))


@dataclass(frozen=True)
class Stream:
    """The blocks of rows [first_row, end_row): each row has turns(row) turns, and a turn reads span(row, turn).

    A span is (first token, end) of the row's context, the first at the start of a page; a block is as many of its pages
    as fit in a slot of `buffer`. An empty span is one block without pages.
    """

    cache: Any  # HBM [pages, channels, page_size, lanes]
    table: Any  # HBM [S, 1, P] i32
    buffer: Any  # VMEM [slots, channels, block, lanes]
    arrived: Any  # DMA semaphores [slots]
    tables: Any  # SMEM [table slots, 1, P] i32: rows of the table
    table_arrived: Any  # DMA semaphores [table slots]
    cursor: Any  # SMEM [5] i32: row, turn and block of the next copy; blocks started; blocks taken
    page_size: int
    first_row: Array
    end_row: Array
    turns: Callable[[Array], Array]
    span: Callable[[Array, Array], tuple[Array, Array]]

    @property
    def block(self) -> int:
        return self.buffer.shape[2]

    def blocks(self, start: Array, end: Array) -> Array:
        """-> the number of blocks of a span."""
        return jnp.maximum(pl.cdiv(end - start, self.block), 1)

    def begin(self) -> None:
        """Start the first copies."""
        self.cursor[ROW] = self.first_row
        for place in (TURN, BLOCK, STARTED, TAKEN):
            self.cursor[place] = 0
        for i in range(self.tables.shape[0]):
            self._start_table(self.first_row + i)
        for _ in range(self.buffer.shape[0] - 1):
            self._start_next()

    def take(self, start: Array, end: Array, block: Array, *, full: bool = False) -> Array:
        """-> the slot that holds block `block` of the span, once it has arrived; the slot taken before is given up.

        `full`: the caller knows that every page of the block is there.
        """
        slot = jax.lax.rem(self.cursor[TAKEN], self.buffer.shape[0])
        self.cursor[TAKEN] += 1
        if full:
            here = self.buffer.at[slot]
            pltpu.make_async_copy(here, here, self.arrived.at[slot]).wait()
        else:
            count = self._pages(start, end, block)[1]

            @pl.loop(0, count)
            def _(i: Array) -> None:
                self._copy(0, slot, i).wait()

        self._start_next()
        return slot

    def _pages(self, start: Array, end: Array, block: Array) -> tuple[Array, Array]:
        """-> the first page of a block and how many there are."""
        most = self.block // self.page_size
        first = start // self.page_size + block * most
        return first, jnp.clip(pl.cdiv(end, self.page_size) - first, 0, most)

    def _copy(self, page: Any, slot: Array, place: Any) -> Any:
        at = pl.ds(pl.multiple_of(place * self.page_size, self.page_size), self.page_size)
        return pltpu.make_async_copy(self.cache.at[page], self.buffer.at[slot, :, at], self.arrived.at[slot])

    def _table_copy(self, row: Array) -> Any:
        slot = jax.lax.rem(row, self.tables.shape[0])
        return pltpu.make_async_copy(self.table.at[row], self.tables.at[slot], self.table_arrived.at[slot])

    def _start_table(self, row: Array) -> None:
        @pl.when(row < self.end_row)
        def _() -> None:
            self._table_copy(row).start()

    def _start_next(self) -> None:
        row, turn, block = self.cursor[ROW], self.cursor[TURN], self.cursor[BLOCK]

        @pl.when(row < self.end_row)
        def _() -> None:
            @pl.when((turn == 0) & (block == 0))
            def _() -> None:
                self._table_copy(row).wait()

            start, end = self.span(row, turn)
            first, count = self._pages(start, end, block)
            slot = jax.lax.rem(self.cursor[STARTED], self.buffer.shape[0])
            table = jax.lax.rem(row, self.tables.shape[0])

            for_each(
                count,
                self.block // self.page_size,
                lambda i: self._copy(self.tables[table, 0, first + i], slot, i).start(),
            )

            ends_turn = block + 1 >= self.blocks(start, end)
            ends_row = ends_turn & (turn + 1 >= self.turns(row))
            self.cursor[BLOCK] = jnp.where(ends_turn, 0, block + 1)
            self.cursor[TURN] = jnp.where(ends_row, 0, jnp.where(ends_turn, turn + 1, turn))
            self.cursor[ROW] = jnp.where(ends_row, row + 1, row)
            self.cursor[STARTED] += 1

            @pl.when(ends_row)
            def _() -> None:
                self._start_table(row + self.tables.shape[0])
