"""From files to arrays in small pieces: read, convert, and transpose in the processor's cache, by a few threads.

A weight is stored [out, in] and wanted [in, out]. A block of whole rows is read into a small buffer and written to the
columns of its place from there: 64 rows fill a cache line or two of each column. The buffer's rows lie an odd number of
cache lines apart, since rows a power of two apart would compete for the same few places in the cache.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np

from engine.weights.place import Placement
from engine.weights.stored import StoredTensor

LINE = 64  # bytes of a cache line
BLOCK_BYTES = 3 << 18  # of one block: most of a core's second-level cache
MIN_ROWS, MAX_ROWS = 16, 64
MAX_COLUMNS = 1 << 16
MAX_THREADS = 8


class Copy(NamedTuple):
    """out = the tensor's elements from `start` on; along each axis they are `steps` apart, along the last one 1."""

    tensor: StoredTensor
    start: int
    steps: tuple[int, ...]
    out: np.ndarray
    offset: float  # added to them in float32


class Streamer:
    """Threads that fill arrays from files; a context manager."""

    def __init__(self, threads: int | None = None):
        self._count = threads or min(os.cpu_count() or 1, MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._count, "weights")
        self._own = threading.local()

    def __enter__(self) -> Streamer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def fill(self, wanted: Sequence[tuple[StoredTensor, Placement]]) -> None:
        """Write every placement's elements to its place, in the dtype of the place. Errors: ValueError (reading)."""
        copies = [copy for tensor, placement in wanted for copy in _copies(tensor, placement)]
        if sum(copy.out.nbytes for copy in copies) <= BLOCK_BYTES:
            self._work(copies)
            return
        copies.reverse()
        for done in [self._pool.submit(self._work, copies) for _ in range(self._count)]:
            done.result()

    def _work(self, copies: list[Copy]) -> None:
        """Do copies until none is left; several threads may share the list."""
        while copies:
            try:
                copy = copies.pop()
            except IndexError:  # another thread was quicker
                return
            self._copy(copy)

    def _copy(self, copy: Copy) -> None:
        tensor, out = copy.tensor, copy.out
        *leading, columns = out.shape
        rows = math.prod(leading)
        as_it_is = tensor.dtype == out.dtype and out.strides[-1] == out.itemsize and not copy.offset
        if as_it_is and (flat := _as_rows(out)) is not None:
            _read(copy, flat)
            return
        buffer = self._buffer(rows, columns, tensor.dtype)
        _read(copy, buffer)
        if copy.offset:
            buffer = buffer.astype(np.float32) + np.float32(copy.offset)
        if buffer.dtype != out.dtype:
            buffer = _convert(buffer, self._buffer(rows, columns, out.dtype, "converted"))
        out[...] = buffer.reshape(out.shape)

    def _buffer(self, rows: int, columns: int, dtype: np.dtype, name: str = "stored") -> np.ndarray:
        """-> this thread's buffer of that name as [rows, columns], with rows an odd number of cache lines apart."""
        lines = -(-columns * dtype.itemsize // LINE) | 1
        size = rows * lines * LINE
        memory = getattr(self._own, name, None)
        if memory is None or len(memory) < size:
            memory = np.zeros(size, np.uint8)
            setattr(self._own, name, memory)
        return memory[:size].view(dtype).reshape(rows, -1)[:, :columns]


def _copies(tensor: StoredTensor, placement: Placement) -> Iterator[Copy]:
    """Yields the placement in blocks of a cache's size."""
    view, out = placement.view, placement.out
    if not out.size:
        return
    steps = [math.prod(view[i + 1 :]) for i in range(len(view))]
    start = placement.base + sum(first * step for (first, _), step in zip(placement.ranges, steps, strict=True))
    axes: list[tuple[int, int, int]] = []  # size, step and stride of those that are one in neither file nor memory
    for size, step, stride in zip(out.shape, steps, out.strides, strict=True):
        if axes and axes[-1][1:] == (size * step, size * stride):
            axes[-1] = axes[-1][0] * size, step, stride
        elif size > 1:
            axes.append((size, step, stride))
    if not axes or axes[-1][1] != 1:
        axes.append((1, 1, out.itemsize))
    sizes, steps, strides = (list(values) for values in zip(*axes, strict=True))
    merged = np.lib.stride_tricks.as_strided(out, sizes, strides)
    yield from _blocks(Copy(tensor, start, tuple(steps), merged, placement.offset))


def _blocks(copy: Copy) -> Iterator[Copy]:
    """Yields a copy in blocks of at most MAX_ROWS by MAX_COLUMNS."""
    tensor, start, steps, out, _ = copy
    *leading, columns = out.shape
    if columns > MAX_COLUMNS:
        whole = columns // MAX_COLUMNS * MAX_COLUMNS
        folded = np.reshape(out[..., :whole], (*leading, -1, MAX_COLUMNS), copy=False)
        yield from _blocks(copy._replace(steps=(*steps[:-1], MAX_COLUMNS, 1), out=folded))
        if whole < columns:
            yield from _blocks(copy._replace(start=start + whole, out=out[..., whole:]))
        return
    most = BLOCK_BYTES // (columns * max(tensor.dtype.itemsize, out.itemsize))
    most = 1 << max(MIN_ROWS, min(MAX_ROWS, most)).bit_length() - 1
    cut, rows = len(leading), 1  # axes from `cut` on are whole in each block
    while cut and rows * leading[cut - 1] <= most:
        cut -= 1
        rows *= leading[cut]
    if cut == 0:
        yield copy
        return
    axis, piece = cut - 1, max(1, most // rows)
    for index in np.ndindex(*leading[:axis]):
        first = start + sum(i * step for i, step in zip(index, steps, strict=False))
        for i in range(0, leading[axis], piece):
            block = out[index][i : i + piece]
            yield copy._replace(start=first + i * steps[axis], steps=steps[axis:], out=block)


def _read(copy: Copy, rows: np.ndarray) -> None:
    """Read a copy's elements into rows [out's leading axes, columns], in as few pieces as the file has them."""
    shape, steps = copy.out.shape, copy.steps
    cut = len(shape) - 1  # axes from `cut` on lie in the file without a gap
    while cut and steps[cut - 1] == shape[cut] * steps[cut]:
        cut -= 1
    count = math.prod(shape[cut:-1])
    for n, index in enumerate(np.ndindex(*shape[:cut])):
        start = copy.start + sum(i * step for i, step in zip(index, steps, strict=False))
        copy.tensor.read(start, rows[n * count : (n + 1) * count])


def _as_rows(out: np.ndarray) -> np.ndarray | None:
    """-> out [..., columns] as [rows, columns] of the same memory; None if its rows are not evenly apart."""
    try:
        return np.reshape(out, (-1, out.shape[-1]), copy=False)
    except ValueError:
        return None


def _convert(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    """-> out, with the values of rows. Types of one byte go through a table: 7 times as fast as numpy's casts."""
    if rows.dtype.itemsize == 1:
        out[...] = np.take(_table(rows.dtype, out.dtype), rows.view(np.uint8), mode="clip")  # checks no index
    else:
        out[...] = rows
    return out


@cache
def _table(source: np.dtype, target: np.dtype) -> np.ndarray:
    """-> the 256 values of a type of one byte in another type."""
    return np.arange(256, dtype=np.uint8).view(source).astype(target)
