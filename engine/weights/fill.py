"""Filler: one parameter after another, read from a checkpoint's tensors straight into the memory of its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from engine.models.narrow_placement import Narrow, Pieces, PlacedArray, narrowed
from engine.models.placement import Path, Placed
from engine.weights.narrow_parts import merge_rows, narrow_part, parts_of_piece
from engine.weights.narrow_tensors import Packed
from engine.weights.packed import expanded
from engine.weights.part import Part
from engine.weights.place import place
from engine.weights.shards import Arrivals, Shard, aligned
from engine.weights.stored import StoredTensor
from engine.weights.stream import Streamer
from kernels.quantized import QuantizedTensor

PartsOf = Callable[[Path], Sequence[Part]]  # a parameter's path -> what it is made of


@dataclass(frozen=True)
class Filler:
    """Makes parameters of a checkpoint's tensors. What it reads is the shards that this host's devices hold."""

    source: str  # the checkpoint, for errors
    tensors: Mapping[str, StoredTensor]
    dtype: str  # of parameters that have none of their own
    online: bool  # narrow ones are read in `dtype`, and quantized as they arrive
    arrivals: Arrivals
    streamer: Streamer

    def make(self, node: Placed | Narrow | Pieces, parts_of: PartsOf) -> Any:
        """-> the parameter. Errors: ValueError for a tensor that cannot be read, or that cannot be stored so."""
        if isinstance(node, Placed):
            return self._wide(node, parts_of)
        if isinstance(node, Narrow):
            return narrowed(self._wide(node.wide, parts_of), node) if self.online else self._packed(node, parts_of)
        own = lambda i: lambda path: parts_of_piece(parts_of(path), node.how, i)
        return node.joined([self.make(piece, own(i)) for i, piece in enumerate(node.pieces)])

    def _wide(self, placed: Placed, parts_of: PartsOf) -> jax.Array:
        def fill(shards: Sequence[Shard]) -> None:
            boxes = [box for shard in shards for box in _boxes(placed, shard)]
            made = [(part, place(part, *box.memory)) for box in boxes for part in parts_of(box.path)]
            self.streamer.fill([(_readable(self.tensors[part.tensor]), at) for part, at in made if at])
            for box in boxes:
                box.settle()

        return self.arrivals.make(placed.shape, placed.spec.dtype or self.dtype, placed.sharding, fill)

    def _packed(self, node: Narrow, parts_of: PartsOf) -> QuantizedTensor:
        """-> a parameter as its tensors store it: each of its arrays from the same one of theirs."""
        layout = node.storage.layout
        names = {part.tensor for path in node.wide.sources if path is not None for part in parts_of(path)}
        stored = {name: self.tensors[name].arrays(layout) for name in names}  # type: ignore[attr-defined]

        def make(array: PlacedArray) -> jax.Array:
            def fill(shards: Sequence[Shard]) -> None:
                boxes = [box for shard in shards for box in _boxes(array, shard, array.rows)]
                narrow = lambda part: narrow_part(part, node.parameter, array.source_width)
                made = [(part, place(narrow(part), *box.memory)) for box in boxes for part in parts_of(box.path)]
                self.streamer.fill([(stored[part.tensor][array.name], at) for part, at in made if at])
                for box in boxes:
                    box.settle(f"{self.source}: {parts_of(box.path)[0].tensor}")

            return self.arrivals.make(array.shape, array.dtype, array.sharding, fill)

        return QuantizedTensor(layout, **{array.name: make(array) for array in node.arrays})


def _readable(tensor: StoredTensor) -> StoredTensor:
    """-> the tensor, such that runs of it can be read quickly."""
    return expanded(tensor) if isinstance(tensor, Packed) else tensor


class _Box(NamedTuple):
    """Memory for a box of a parameter, and the part of a shard that it is for, unless it is that part already.

    `rows`: how many neighbours along the last but one axis of the memory share an entry of the shard.
    """

    path: Path
    memory: Shard
    target: np.ndarray | None
    rows: int

    def settle(self, source: str = "") -> None:
        """Errors: ValueError that names the source, if rows differ that are to share an entry."""
        if self.target is not None:
            array = self.memory.array
            made = merge_rows(array, self.rows, source) if self.rows > 1 else array
            self.target[...] = made.reshape(self.target.shape)


def _boxes(placed: Placed | PlacedArray, shard: Shard, rows: int = 1) -> Iterator[_Box]:
    """Yields what a shard is made of; what no box fills is zero from now on. A shard of one box is filled in place."""
    array, corner = shard
    pieces = list(placed.pieces(corner, array.shape))
    if rows == 1 and len(pieces) == 1 and not placed.stacked and array[pieces[0].at].shape == array.shape:
        yield _Box(pieces[0].path, Shard(array, pieces[0].corner), None, rows)
        return
    array[...] = 0
    for path, start, at in pieces:
        target = array[at]
        size = list(target.shape[1:] if placed.stacked else target.shape)
        if rows > 1:  # by output first: parts' blocks of scales may end anywhere
            size[-2], start = size[-2] * rows, (*start[:-2], start[-2] * rows, start[-1])
        yield _Box(path, Shard(aligned(size, array.dtype), start), target, rows)
