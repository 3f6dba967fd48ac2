"""New keys and values into their pages, in place: pieces of pages are read, merged and written back by copies.

All of a step's tokens are written before any is read, since a row may read what a row before it writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas.call import Arrays, Call
from kernels.pallas.layout import LANES, SUBLANES, ceil_to
from kernels.storage import in_range

SLOTS = 8  # pieces whose copies are under way at once: half of them coming, half going
ROW, PIECE, COUNT, WINDOW, WINDOWS = range(5)  # of a cursor


class Scratch(NamedTuple):
    pieces: Any  # VMEM [SLOTS, channels, W, lanes]: parts of pages
    windows: Any  # VMEM [SLOTS, 1 or 2, heads, N, D]: new keys and values, from HBM
    new: Any  # VMEM [channels, lanes / 128, W + N + W, 128] f32: one window as it will be stored
    read: Any  # DMA semaphores [SLOTS]
    fetched: Any  # DMA semaphores [SLOTS]
    written: Any  # DMA semaphores [SLOTS]
    cursors: Any  # SMEM [2, 5] i32: of what is started, and of what is done
    going: Any  # SMEM [SLOTS] i32: whether a piece is on its way back


def scratch_types(call: Call, piece: int, single: bool) -> Scratch:
    """`piece`: tokens of a page that are written at once. `single`: rows have one token."""
    layout, heads, dim = call.layout, call.layout.heads, call.spec.head_dim
    window = min(SUBLANES if single else piece + SUBLANES, call.tokens)
    parts = 1 if call.spec.value_dim is not None else 2
    semaphores = pltpu.SemaphoreType.DMA((SLOTS,))
    return Scratch(
        pltpu.VMEM((SLOTS, layout.channels, piece, layout.lanes), call.kv_dtype),
        pltpu.VMEM((SLOTS, parts, heads, window, dim), call.q_dtype),
        pltpu.VMEM((layout.channels, layout.lanes // LANES, ceil_to(2 * piece + window, SUBLANES), LANES), jnp.float32),
        semaphores,
        semaphores,
        semaphores,
        pltpu.SMEM((2, 5), jnp.int32),
        pltpu.SMEM((SLOTS,), jnp.int32),
    )


class Piece(NamedTuple):
    """Part of a page: its tokens [low, high) are new."""

    page: Array
    offset: Array  # of the piece in its page
    low: Array
    high: Array
    window: Array  # where its window of new tokens starts
    shift: Array  # token 0 of the piece, counted from the start of the window; may be negative
    last: Array  # whether the row ends with it

    def is_partial(self, size: int) -> Array:
        """Whether some of its tokens are new and some are not."""
        return (self.low < self.high) & ((self.low > 0) | (self.high < size))


def write(call: Call, arrays: Arrays, scratch: Scratch, first_row: Array, end_row: Array) -> None:
    """Write the new tokens of rows [first_row, end_row)."""
    piece_size, window_size = scratch.pieces.shape[2], scratch.windows.shape[3]

    def find(row: Array, index: Array) -> Piece:
        begin, end, length = arrays.cu_q_lens[row], arrays.cu_q_lens[row + 1], arrays.kv_lens[row]
        position = length - (end - begin)  # of the row's first new token
        start = (position // piece_size + index) * piece_size
        low, high = jnp.maximum(position, start), jnp.minimum(length, start + piece_size)
        token = jnp.minimum(begin + low - position, call.tokens - 1)
        window = jnp.minimum(token // SUBLANES * SUBLANES, call.tokens - window_size)
        shift = begin + start - position - window
        offset = jax.lax.rem(start, call.page_size)
        last = start + piece_size >= length
        return Piece(arrays.write_page[token], offset, low - start, high - start, window, shift, last)

    def move(cursor: Any, piece: Piece) -> None:
        cursor[WINDOWS] += (piece.window != cursor[WINDOW]).astype(jnp.int32)
        cursor[WINDOW] = piece.window
        cursor[COUNT] += 1
        cursor[PIECE] = jnp.where(piece.last, 0, cursor[PIECE] + 1)
        cursor[ROW] += piece.last.astype(jnp.int32)

    def page_copy(piece: Piece, slot: Array, *, back: bool) -> Any:
        at = pl.ds(pl.multiple_of(piece.offset, SUBLANES), piece_size)
        page, here = arrays.cache.at[piece.page, :, at], scratch.pieces.at[slot]
        if back:
            return pltpu.make_async_copy(here, page, scratch.written.at[slot])
        return pltpu.make_async_copy(page, here, scratch.read.at[slot])

    def window_copies(start: Array, slot: Array) -> list[Any]:
        whole = window_size == call.tokens
        at = slice(None) if whole else pl.ds(pl.multiple_of(start, SUBLANES), window_size)
        sources = [arrays.k] if arrays.v is None else [arrays.k, arrays.v]
        return [
            pltpu.make_async_copy(source.at[:, at], scratch.windows.at[slot, i], scratch.fetched.at[slot])
            for i, source in enumerate(sources)
        ]

    def settle(slot: Array | int) -> None:
        """Wait until what went back from a slot is there."""

        @pl.when(scratch.going[slot] != 0)
        def _() -> None:
            page = arrays.cache.at[0, :, pl.ds(0, piece_size)]
            pltpu.make_async_copy(scratch.pieces.at[slot], page, scratch.written.at[slot]).wait()
            scratch.going[slot] = 0

    def start_next() -> None:
        cursor = scratch.cursors.at[0]

        @pl.when(cursor[ROW] < end_row)
        def _() -> None:
            piece = find(cursor[ROW], cursor[PIECE])
            slot = jax.lax.rem(cursor[COUNT], SLOTS)

            @pl.when(piece.window != cursor[WINDOW])
            def _() -> None:
                for copy in window_copies(piece.window, jax.lax.rem(cursor[WINDOWS], SLOTS)):
                    copy.start()

            settle(slot)

            @pl.when(piece.is_partial(piece_size))
            def _() -> None:
                page_copy(piece, slot, back=False).start()

            move(cursor, piece)

    def finish_next(row: Array) -> Array:
        cursor = scratch.cursors.at[1]
        piece = find(row, cursor[PIECE])
        slot = jax.lax.rem(cursor[COUNT], SLOTS)

        @pl.when(piece.window != cursor[WINDOW])
        def _() -> None:
            window = jax.lax.rem(cursor[WINDOWS], SLOTS)
            for copy in window_copies(piece.window, window):
                copy.wait()
            _prepare(call, arrays, scratch, window)

        @pl.when(piece.is_partial(piece_size))
        def _() -> None:
            page_copy(piece, slot, back=False).wait()

        @pl.when(piece.low < piece.high)
        def _() -> None:
            _merge(call, scratch, slot, piece)
            page_copy(piece, slot, back=True).start()
            scratch.going[slot] = 1

        move(cursor, piece)
        start_next()
        return cursor[ROW]

    for i in range(2):
        for place, value in ((ROW, first_row), (PIECE, 0), (COUNT, 0), (WINDOW, -1), (WINDOWS, 0)):
            scratch.cursors[i, place] = value
    for slot in range(SLOTS):
        scratch.going[slot] = 0
    scratch.new[...] = jnp.zeros(scratch.new.shape, jnp.float32)
    for _ in range(SLOTS // 2):
        start_next()
    jax.lax.while_loop(lambda row: row < end_row, finish_next, first_row)
    for slot in range(SLOTS):
        settle(slot)


def _prepare(call: Call, arrays: Arrays, scratch: Scratch, window: Array) -> None:
    """Bring a window of new keys and values into the form in which pages hold them, but as float32."""
    layout, dim = call.layout, call.spec.head_dim
    piece_size, size = scratch.pieces.shape[2], scratch.windows.shape[3]
    for part in range(scratch.windows.shape[1]):
        for head in range(layout.heads):
            channel, lane = (head, 0) if part == 0 else (layout.value_channel(head), layout.value_lane)
            x = scratch.windows[window, part, head].astype(jnp.float32)
            if call.scaled:  # in float32, as `kernels.storage.stored` divides
                x = x / arrays.kv_scales[part, head]
            for i in range(0, dim, LANES):
                tile = x[:, i : i + LANES]
                at = pl.ds(piece_size, size), pl.ds(lane, tile.shape[1])
                scratch.new[channel, i // LANES, *at] = tile


def _merge(call: Call, scratch: Scratch, slot: Array, piece: Piece) -> None:
    """Put the new tokens into a piece of a page."""
    size, lanes = scratch.pieces.shape[2:]
    token = jax.lax.broadcasted_iota(jnp.int32, (size, lanes), 0)
    is_new = (token >= piece.low) & (token < piece.high)
    at = pl.ds(size + piece.shift, size)
    for channel in range(call.layout.channels):
        old = scratch.pieces[slot, channel].astype(jnp.float32)
        # Tile by tile: a load may start at any row, but only if it is one tile wide.
        new = jnp.concatenate([scratch.new[channel, i, at, :] for i in range(lanes // LANES)], axis=1)
        scratch.pieces[slot, channel] = jnp.where(is_new, in_range(new, call.kv_dtype), old).astype(call.kv_dtype)
