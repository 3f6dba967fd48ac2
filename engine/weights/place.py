"""Which elements of a stored tensor a shard of a parameter needs, and where in the shard they go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.weights.part import Part

Range = tuple[int, int]  # first and end


class Placement(NamedTuple):
    """out[...] = tensor's elements from `base` on, seen as [*view], cut to `ranges`. `out` is a view of the shard.

    `offset` is added to them in float32.
    """

    base: int
    view: tuple[int, ...]
    ranges: tuple[Range, ...]
    out: np.ndarray
    offset: float = 0.0


def place(part: Part, shard: np.ndarray, corner: Sequence[int]) -> Placement | None:
    """-> what fills the shard from this part; None if they have nothing in common.

    `shard` is parameter[corner[0] : corner[0] + shard.shape[0], ...]. Errors: ValueError for a shard that would need
    elements from all over the tensor, as half of every rope pair would.
    """
    block_ranges, inside = [], []
    for axis, (first, size) in enumerate(zip(corner, shard.shape, strict=True)):
        at = part.at[axis] if axis < len(part.at) else slice(None)
        at_first, at_end = at.start or 0, first + size if at.stop is None else at.stop
        low, high = max(first, at_first), min(first + size, at_end)
        if low >= high:
            return None
        block_ranges.append((low - at_first, high - at_first))
        inside.append(slice(low - first, high - first))
    takes = [
        (take.start or 0, size if take.stop is None else take.stop)
        for take, size in zip([*part.take, *[slice(None)] * (len(part.view) - len(part.take))], part.view, strict=True)
    ]
    ordered = [takes[axis][1] - takes[axis][0] for axis in part.order]
    ranges = _regroup(part, block_ranges, ordered)
    out = np.reshape(shard[tuple(inside)], [high - low for low, high in ranges], copy=False)
    back = np.argsort(part.order)
    stored = [(ranges[i][0] + takes[axis][0], ranges[i][1] + takes[axis][0]) for axis, i in enumerate(back)]
    first_row = part.rows[0] if part.rows else 0
    base = first_row * math.prod(part.shape[1:])
    return Placement(base, part.view, tuple(stored), out.transpose(back), part.offset)


def _regroup(part: Part, ranges: Sequence[Range], sizes: Sequence[int]) -> list[Range]:
    """-> ranges over axes of `sizes` that hold what `ranges` hold over the axes of part.block, reshaped."""
    result: list[Range] = []
    i = j = 0
    while i < len(part.block) or j < len(sizes):
        i_end, j_end = min(i + 1, len(part.block)), min(j + 1, len(sizes))
        while (a := math.prod(part.block[i:i_end])) != (b := math.prod(sizes[j:j_end])):
            if a < b:
                i_end += 1
            else:
                j_end += 1
        result += _split(_merge(part, part.block[i:i_end], ranges[i:i_end]), sizes[j:j_end], part)
        i, j = i_end, j_end
    return result


def _merge(part: Part, sizes: Sequence[int], ranges: Sequence[Range]) -> Range:
    """-> the ranges as one range of the axes' product: all but the first axis that isn't 1 must be whole."""
    low, high, whole = 0, 1, True
    for size, (first, end) in zip(reversed(sizes), reversed(ranges), strict=True):
        if not whole:
            if size != 1:
                raise _cannot(part)
            continue
        inner = high
        low, high, whole = first * inner, end * inner, (first, end) == (0, size)
    return low, high


def _split(merged: Range, sizes: Sequence[int], part: Part) -> list[Range]:
    """-> one range of a product as ranges of its axes: a range of the first axis that isn't 1, all of the others."""
    low, high = merged
    result: list[Range] = []
    for i, size in enumerate(sizes):
        inner = math.prod(sizes[i + 1 :])
        if (low, high) == (0, size * inner) or size == 1:
            result.append((0, size))
            low, high = (low, high) if size == 1 else (0, inner)
        elif low % inner == 0 and high % inner == 0:
            result.append((low // inner, high // inner))
            low, high = 0, inner
        else:
            raise _cannot(part)
    return result


def _cannot(part: Part) -> ValueError:
    return ValueError(f"{part.tensor}: a shard cuts through axes that are stored as one; shard another axis")
