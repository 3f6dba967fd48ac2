"""Where parameters in few bits lie: their arrays are split, padded, copied and stacked as the wide parameter would be.

A QuantizedTensor's arrays have a parameter's outputs first, then one axis about all of its inputs. Both are split along
the logical axes of the parameter, values and scales alike. Zeros in all arrays stand for zero in every format, so that
padding is zero here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from engine.models.config import ModelConfig
from engine.models.narrow import INPUTS, Plan, Split, Storage, array_shape, outputs_of
from engine.models.params import Params
from engine.models.placement import Path, Piece, Placed, map_placed
from engine.models.relay import random_params
from kernels.quantized import SUPER, Joined, Layout, QuantizedTensor, quantize


@dataclass(frozen=True)
class PlacedArray:
    """One array of a parameter in few bits, as `Placed` is one of a wide one. `wide`: where the parameter would lie."""

    wide: Placed
    parameter: str
    layout: Layout
    name: str
    dtype: str

    @property
    def stacked(self) -> bool:
        return self.wide.stacked

    @property
    def rows(self) -> int:
        """-> how many outputs, of the last axis of them, share an entry."""
        return self.layout.rows if self.name == "scales" else 1

    @cached_property
    def shape(self) -> tuple[int, ...]:
        lead = 1 if self.stacked else 0
        return (*self.wide.shape[:lead], *self._of(self.wide.shape[lead:]))

    @property
    def source_width(self) -> int:
        """-> entries for all inputs of a source."""
        return self._of(self.wide.spec.shape)[-1]

    @property
    def sharding(self) -> Sharding | None:
        wide, lead = self.wide.sharding, 1 if self.stacked else 0
        if not isinstance(wide, NamedSharding):
            return wide
        first, parts = tuple(wide.spec)[:lead], tuple(wide.spec)[lead:]
        outputs = [part for i, part in enumerate(parts) if i not in self._inputs]
        inputs = parts[self._inputs[0]] if self.shape[-1] > 1 else None
        return NamedSharding(wide.mesh, PartitionSpec(*first, *outputs, inputs))

    def pieces(self, corner: Sequence[int], shape: Sequence[int]) -> Iterator[Piece]:
        """As Placed.pieces, of the arrays that the sources would have."""
        lead = 1 if self.stacked else 0
        wide_corner, wide_shape = list(corner[:lead]), list(shape[:lead])
        bounds = self._wide_bounds(corner[lead:], shape[lead:])
        wide_corner += [low for low, _ in bounds]
        wide_shape += [high - low for low, high in bounds]
        for path, source, at in self.wide.pieces(wide_corner, wide_shape):
            spans = [(span.start, span.stop) for span in at[lead:]]
            start = [(low, low + high - first) for low, (first, high) in zip(source, spans, strict=True)]
            taken = self._entries(start, self.wide.spec.shape)
            put = self._entries(spans, wide_shape[lead:])
            yield Piece(path, tuple(low for low, _ in taken), (*at[:lead], *(slice(*bound) for bound in put)))

    @property
    def _inputs(self) -> tuple[int, ...]:
        return INPUTS[self.parameter]

    def _of(self, shape: Sequence[int]) -> tuple[int, ...]:
        return array_shape(self.name, *outputs_of(self.parameter, tuple(shape)), self.layout)

    def _wide_bounds(self, corner: Sequence[int], shape: Sequence[int]) -> list[tuple[int, int]]:
        """-> for each axis of the parameter, what the array's entries are about."""
        lead = 1 if self.stacked else 0
        sizes = self.wide.shape[lead:]
        bounds = [(low, low + size) for low, size in zip(corner, shape, strict=True)]
        bounds[-2] = bounds[-2][0] * self.rows, bounds[-2][1] * self.rows
        found, outputs = [(0, size) for size in sizes], iter(bounds[:-1])
        for axis in range(len(sizes)):
            if axis not in self._inputs:
                found[axis] = next(outputs)
        if self.shape[-1] > 1:  # only the first of several axes of inputs is split, so that a part of them is a run
            first, inner = self._inputs[0], math.prod(sizes[i] for i in self._inputs[1:])
            each = math.prod(sizes[i] for i in self._inputs) // self.shape[-1]
            low, high = (end * each for end in bounds[-1])
            assert low % inner == 0 and high % inner == 0
            found[first] = low // inner, high // inner
        return found

    def _entries(self, box: Sequence[tuple[int, int]], sizes: Sequence[int]) -> list[tuple[int, int]]:
        """-> what a box of a parameter of these sizes is of its array."""
        found = [bound for i, bound in enumerate(box) if i not in self._inputs]
        found[-1] = found[-1][0] // self.rows, found[-1][1] // self.rows
        if self.shape[-1] == 1:
            return [*found, (0, 1)]
        low, count = run_of_inputs(box, sizes, self._inputs)
        each = math.prod(self.wide.spec.shape[i] for i in self._inputs) // self.source_width
        return [*found, (low // each, (low + count) // each)]


@dataclass(frozen=True)
class Narrow:
    """A parameter in few bits. `wide`: where it would lie otherwise; `storage` fits what each device has of it."""

    wide: Placed
    parameter: str
    storage: Storage

    @property
    def arrays(self) -> list[PlacedArray]:
        layout = self.storage.layout
        return [PlacedArray(self.wide, self.parameter, layout, name, dtype) for name, dtype in self.storage.arrays]


@dataclass(frozen=True)
class Pieces:
    """A parameter in pieces along an axis of its outputs, as `how` says."""

    parameter: str
    how: Split
    pieces: tuple[Placed | Narrow, ...]

    def joined(self, pieces: Sequence[Any]) -> Joined:
        """-> the pieces as one weight."""
        axis = self.how.axis - sum(i < self.how.axis for i in INPUTS[self.parameter])
        return Joined(axis, tuple(pieces))


def stored_as(placed: Params, plan: Plan) -> Params:
    """A tree of Placed -> the same with a Narrow or Pieces for each parameter that `plan` has in few bits.

    What stages have in one place in different formats is in none of them. Errors: ValueError with the numbers for a
    mesh that would cut through a group of inputs, or a block of outputs, that shares a scale.
    """

    def one(placed: Placed) -> Placed | Narrow | Pieces:
        path, *others = [path for path in placed.sources if path is not None]
        how = plan.get(path)
        if how is None or any(plan.get(other) != how for other in others):
            return placed
        if isinstance(how, Storage):
            return _narrow(placed, path, how)
        pieces = [(_piece(placed, how.axis, first, end), storage) for first, end, storage in how.pieces]
        return Pieces(path[-1], how, tuple(_narrow(own, path, storage) if storage else own for own, storage in pieces))

    return map_placed(one, placed)


def unpacked(placed: Params, plan: Plan) -> list[str]:
    """-> the parameters that `plan` has in few bits and `stored_as` has not, e.g. layers.3.down."""
    found: list[str] = []

    def one(placed: Placed) -> None:
        paths = [path for path in placed.sources if path is not None and path in plan]
        if paths and isinstance(stored_as({"": placed}, plan)[""], Placed):
            found.extend(map(_dotted, paths))

    map_placed(one, placed)
    return found


def map_stored(function: Callable[[Any], Any], tree: Params) -> Params:
    return jax.tree.map(function, tree, is_leaf=lambda node: isinstance(node, (Placed, Narrow, Pieces)))


def abstract_narrow(placed: Params, dtype: str, plan: Plan) -> Params:
    """-> shapes, dtypes and shardings of parameters that are still to come, of which `plan` has some in few bits.

    Errors: as stored_as.
    """

    def one(node: Placed | Narrow | Pieces) -> Any:
        if isinstance(node, Placed):
            return jax.ShapeDtypeStruct(node.shape, node.spec.dtype or dtype, sharding=node.sharding)
        if isinstance(node, Pieces):
            return node.joined([one(piece) for piece in node.pieces])
        arrays: dict[str, Any] = {
            array.name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding) for array in node.arrays
        }
        return QuantizedTensor(node.storage.layout, **arrays)

    return map_stored(one, stored_as(placed, plan))


def random_narrow(config: ModelConfig, dtype: str, seed: int, placed: Params, plan: Plan) -> Params:
    """As `relay.random_params`, quantized one by one as `plan`, which has no splits, says."""

    def keep(placed: Placed, wide: jax.Array) -> Any:
        node = stored_as({"": placed}, plan)[""]
        assert not isinstance(node, Pieces)
        return narrowed(wide, node) if isinstance(node, Narrow) else wide

    return random_params(config, dtype, seed, placed, keep)


def narrowed(weight: jax.Array, node: Narrow) -> QuantizedTensor:
    """A parameter as the model sees it, where it lies -> the same, quantized."""
    shardings = tuple((array.name, array.sharding) for array in node.arrays)
    return _quantizer(INPUTS[node.parameter], int(node.wide.stacked), node.storage.layout, shardings)(weight)


@cache  # one executable for all layers that are alike
def _quantizer(
    inputs: tuple[int, ...], lead: int, layout: Layout, shardings: tuple[tuple[str, Sharding | None], ...]
) -> Callable[[jax.Array], QuantizedTensor]:
    def quantized(weight: jax.Array) -> QuantizedTensor:
        last = [i + lead for i in inputs]
        outputs = [i for i in range(weight.ndim) if i not in last]
        ordered = weight.transpose(*outputs, *last)
        return quantize(ordered.reshape(*(weight.shape[i] for i in outputs), -1), layout)

    arrays: dict[str, Any] = dict(shardings)
    alone = all(sharding is None for sharding in arrays.values())
    return jax.jit(quantized, out_shardings=None if alone else QuantizedTensor(layout, **arrays))


def run_of_inputs(box: Sequence[tuple[int, int]], sizes: Sequence[int], inputs: Sequence[int]) -> tuple[int, int]:
    """-> the first of a box's inputs, counted over all axes of them, and how many there are: they are a run."""
    start, count, is_whole = 0, 1, True
    for axis in reversed(inputs):
        low, high = box[axis]
        inner = math.prod(sizes[i] for i in inputs if i > axis)
        assert is_whole or high - low == 1, "a box's inputs are no run"
        start, count = start + low * inner, count * (high - low)
        is_whole = is_whole and (low, high) == (0, sizes[axis])
    return start, count


def _narrow(placed: Placed, path: Path, storage: Storage) -> Narrow:
    """-> the parameter, packed such that no device's part of it begins within a run of packed numbers."""
    layout, name, inputs = storage.layout, path[-1], INPUTS[path[-1]]
    lead = 1 if placed.stacked else 0
    own = placed.sharding.shard_shape(placed.shape) if isinstance(placed.sharding, NamedSharding) else placed.shape
    outputs, count = outputs_of(name, own[lead:])
    if outputs[-1] % layout.rows:
        raise _cut(path, f"{layout.rows} outputs", f"{outputs[-1]} of its {outputs_of(name, placed.spec.shape)[0][-1]}")
    unit = count
    for _, source, at in placed.pieces([0] * len(placed.shape), placed.shape):
        spans = [(span.start, span.stop) for span in at[lead:]]
        begin, _ = run_of_inputs([(low, low + 1) for low in source], placed.spec.shape, inputs)
        to, many = run_of_inputs(spans, placed.shape[lead:], inputs)
        unit = math.gcd(unit, begin, to, many)
    split = math.gcd(layout.split, max(unit // 2, 1)) if layout.split else 0
    shared = SUPER if any(array == "super_scales" for array, _ in storage.arrays) else layout.group or 1
    if unit % shared or (split and unit % (2 * split)):
        whole = math.prod(placed.spec.shape[i] for i in inputs)
        raise _cut(path, f"{max(shared, 2)} inputs", f"{count} of its {whole}, in runs of {unit}")
    return Narrow(placed, name, replace(storage, layout=replace(layout, split=split)))


def _piece(placed: Placed, axis: int, first: int, end: int) -> Placed:
    """-> a part of a parameter along an axis that no mesh splits; of the heads' fused axis, queries, key or value."""
    spec, lead = placed.spec, 1 if placed.stacked else 0
    name, size = spec.axes[axis], end - first
    if name == "group_kv":
        name = "group" if first == 0 and end == spec.shape[axis] - 2 else None
    padded = placed.heads.own_group if name == "group" and not placed.heads.is_plain else size
    with_axis = lambda values, value: (*values[:axis], value, *values[axis + 1 :])
    shape = (*placed.shape[:lead], *with_axis(placed.shape[lead:], padded))
    return replace(
        placed, spec=replace(spec, shape=with_axis(spec.shape, size), axes=with_axis(spec.axes, name)), shape=shape
    )


def _cut(path: Path, shared: str, each: str) -> ValueError:
    return ValueError(
        f"quantization: {_dotted(path)} is stored with scales for {shared}, of which a device must have all, and here "
        f"each would have {each}; use another tensor_parallel_size, or quantization dequantize"
    )


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
