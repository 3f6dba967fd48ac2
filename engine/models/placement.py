"""Where parameters lie on a mesh: which shape each has there, and which boxes of the model's own make up a shard.

Head counts, vocabularies and widths that the devices do not divide are padded with zeros, which the result cannot tell.
The layers of a pipeline's stages are stacked: one array for each place in a stage, with the stages as its first axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from engine.models.config import LayerSpec, ModelConfig
from engine.models.params import Params, ParamSpec, map_specs, param_specs
from sharding.heads import HeadSplit, split_heads
from sharding.rules import EXPERT_RULES, RULES, split_over

Path = tuple[Any, ...]  # of a parameter of the model, e.g. ("layers", 3, "qkv")
Range = tuple[int, int]  # first and end
ALONE = HeadSplit(1, 1, 1, 1, 1)


class Piece(NamedTuple):
    """A box of a parameter, from `corner` on in the model's own shape, and where in a shard it goes."""

    path: Path
    corner: tuple[int, ...]
    at: tuple[slice, ...]


@dataclass(frozen=True)
class Placed:
    """One array of the engine's parameters. `sources`: the parameter that it holds, or one for each stage, None where
    a stage has no such layer; `shape` is with padding, and with the stages first if `stacked`."""

    spec: ParamSpec
    shape: tuple[int, ...]
    sources: tuple[Path | None, ...]
    sharding: Sharding | None = None
    stacked: bool = False
    heads: HeadSplit = ALONE

    @property
    def is_plain(self) -> bool:
        """-> whether it is the parameter as the model has it."""
        return not self.stacked and self.shape == self.spec.shape

    def pieces(self, corner: Sequence[int], shape: Sequence[int]) -> Iterator[Piece]:
        """Yields what the shard [corner[0] : corner[0] + shape[0], ...] is made of; the rest of it is zero."""
        bounds = [(low, low + size) for low, size in zip(corner, shape, strict=True)]
        stages, inner = (bounds[0], bounds[1:]) if self.stacked else ((0, 1), bounds)
        for stage in range(*stages):
            path = self.sources[stage]
            for box in self._boxes(inner) if path is not None else ():
                first = (slice(stage - stages[0], stage - stages[0] + 1),) if self.stacked else ()
                spans = zip(box, inner, strict=True)
                at = tuple(slice(to[0] - low, to[1] - low) for (_, to), (low, _) in spans)
                assert path is not None
                yield Piece(path, tuple(source[0] for source, _ in box), first + at)

    def _boxes(self, bounds: Sequence[Range]) -> Iterator[tuple[tuple[Range, Range], ...]]:
        """Yields (range of the parameter, range of the array) for each axis of every box."""
        choices = [
            [((low, min(high, size)), (low, min(high, size)))] if low < size else []
            for (low, high), size in zip(bounds, self.spec.shape, strict=True)
        ]
        if self.heads.is_plain or "kv_heads" not in self.spec.axes:
            yield from itertools.product(*choices)
            return
        at = self.spec.axes.index("kv_heads")
        for head in range(*bounds[at]):
            source, copy = divmod(head, self.heads.copies)
            if source >= self.heads.kv_heads:
                break
            choices[at] = [((source, source + 1), (head, head + 1))]
            if self.spec.axes[at + 1 :][:1] in (("group",), ("group_kv",)):
                choices[at + 1] = list(self._group(copy, self.spec.axes[at + 1] == "group_kv"))
            yield from itertools.product(*choices)

    def _group(self, copy: int, with_kv: bool) -> Iterator[tuple[Range, Range]]:
        """Yields the query heads of one copy of a KV head, then, `with_kv`, its key and value."""
        group, own = self.heads.group, self.heads.own_group
        first, end = min(copy * own, group), min((copy + 1) * own, group)
        if first < end:
            yield (first, end), (0, end - first)
        if with_kv:
            yield (group, group + 2), (own, own + 2)


def stage_layers(layers: Sequence[LayerSpec], stages: int) -> list[list[int | None]]:
    """-> for each place in a stage, the layer that each stage has there; where stages are shorter, None.

    Layers are spread evenly; the first stages have one more where they do not divide.
    """
    small, more = divmod(len(layers), stages)
    starts = [stage * small + min(stage, more) for stage in range(stages + 1)]
    places = range(small + (more > 0))
    return [
        [starts[s] + place if starts[s] + place < starts[s + 1] else None for s in range(stages)] for place in places
    ]


def on_all(mesh: Mesh) -> Sharding | None:
    """-> the sharding of what every device of a mesh has whole; None: that is on the default device."""
    if mesh.size > 1:
        return NamedSharding(mesh, PartitionSpec())
    device = mesh.devices.flat[0]
    return None if device == jax.devices()[0] else SingleDeviceSharding(device)


def whole(config: ModelConfig, sharding: Callable[[Path, ParamSpec], Sharding | None] | None = None) -> Params:
    """-> the tree of Placed of parameters in the model's own shapes; None: on the default device."""
    place = lambda path, spec: Placed(spec, spec.shape, (path,), sharding(path, spec) if sharding else None)
    return map_specs(place, param_specs(config))


def on_mesh(config: ModelConfig, mesh: Mesh, expert_parallel: bool = False) -> Params:
    """-> the tree of Placed of parameters on a mesh (stage, model). Errors: ValueError for more stages than layers."""
    stages, devices = mesh.shape["stage"], mesh.shape["model"]
    if stages > len(config.layers):
        raise ValueError(
            f"pipeline_parallel_size: {stages} stages are more than the model's {len(config.layers)} layers"
        )
    if mesh.size == 1:
        return whole(config, lambda path, spec: on_all(mesh))
    heads = split_heads(config.num_kv_heads, config.group, devices)
    rules = EXPERT_RULES if expert_parallel else RULES
    resized = {
        "kv_heads": heads.all_kv_heads, "group": heads.own_group, "group_kv": heads.own_group + 2,
    }  # fmt: skip

    def placed(spec: ParamSpec, sources: tuple[Path | None, ...], stacked: bool) -> Placed:
        parts = split_over(spec.axes, rules)
        shape = []
        for size, axis, part in zip(spec.shape, spec.axes, parts, strict=True):
            over = math.prod(mesh.shape[name] for name in part)
            shape.append(resized[axis] if axis in resized else -(-size // over) * over)
        axes = [part or None for part in parts]
        lead: list[Any] = ["stage"] if stacked else []
        sharding = NamedSharding(mesh, PartitionSpec(*lead, *axes))
        return Placed(spec, (*([stages] if stacked else []), *shape), sources, sharding, stacked, heads)

    specs = param_specs(config)
    tree = map_specs(
        lambda path, spec: placed(spec, (path,), False),
        {name: spec for name, spec in specs.items() if name != "layers"},
    )
    places = stage_layers(config.layers, stages)
    tree["layers"] = [_stack(specs["layers"], place, placed) for place in places]
    return tree


def _stack(
    layers: Sequence[dict[str, ParamSpec]], place: Sequence[int | None],
    placed: Callable[[ParamSpec, tuple[Path | None, ...], bool], Placed],
) -> dict[str, Placed]:  # fmt: skip
    """-> the parameters of one place in every stage: all that any stage has there."""
    found: dict[str, ParamSpec] = {}
    for layer in place:
        found |= layers[layer] if layer is not None else {}
    for layer in place:
        for name, spec in layers[layer].items() if layer is not None else ():
            if spec != found[name]:
                raise ValueError(
                    f"pipeline_parallel_size: {name} of layer {layer} is {spec.shape} and of another stage's layer "
                    f"{found[name].shape}, so that they cannot be computed side by side; use another size"
                )
    has = lambda layer, name: layer is not None and name in layers[layer]
    return {
        name: placed(
            spec,
            tuple(("layers", layer, name) if has(layer, name) else None for layer in place),
            len(place) > 1,
        )
        for name, spec in found.items()
    }


def map_placed(function: Callable[[Placed], Any], tree: Params) -> Params:
    return jax.tree.map(function, tree, is_leaf=lambda node: isinstance(node, Placed))
