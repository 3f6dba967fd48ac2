"""From a checkpoint to the engine's parameters, one at a time: names are mapped, products fused, dtypes changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.config import ModelConfig
from engine.models.families import Family
from engine.models.narrow import (
    INPUTS,
    Path,
    Plan,
    Storage,
    array_shape,
    joined,
    narrowed,
    outputs_of,
)
from engine.models.params import Params, ParamSpec, map_specs, param_specs
from engine.models.placement import Placed, map_placed, whole
from engine.models.read import from_gguf, from_hugging_face
from engine.weights.assemble import check_tensors, recipes
from engine.weights.gguf import open_gguf
from engine.weights.kv_scales import KVScales, split_scales
from engine.weights.methods import with_method
from engine.weights.mxfp4 import MicroscaledTensor
from engine.weights.names import GGUF, HF
from engine.weights.narrow_parts import merge_rows, narrow_part, parts_of_piece
from engine.weights.narrow_tensors import Packed
from engine.weights.orbax import OrbaxCheckpoint, is_orbax, open_orbax, restore
from engine.weights.packed import expanded, is_packed
from engine.weights.part import Part
from engine.weights.place import place
from engine.weights.quantization import Quantization, choose_quantization
from engine.weights.safetensors import open_safetensors
from engine.weights.shards import Arrivals, Shard, aligned
from engine.weights.stored import StoredTensor, read_all
from engine.weights.stream import Streamer
from kernels.quantized import QuantizedTensor

WIDE = Quantization()


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the model it holds, and its tensors by name."""

    source: str
    config: ModelConfig
    family: Family
    style: int  # HF or GGUF: whose tensor names
    tensors: Mapping[str, StoredTensor]
    method: str | None = None  # that its weights are quantized by, one of quantization.METHODS
    kv_scales: KVScales = field(default_factory=dict)  # for a KV cache in 8 bits

    def load(self, name: str) -> np.ndarray:
        """-> a whole tensor."""
        return read_all(self.tensors[name])


def open_checkpoint(path: FilePath) -> Checkpoint | OrbaxCheckpoint:
    """-> the checkpoint of a .gguf file, a Hugging Face folder or a folder from `engine.convert`.

    Errors: ValueError that names file and field.
    """
    if is_orbax(path):
        return open_orbax(path)
    if path.is_file() and path.suffix == ".gguf":
        file = open_gguf(path)
        shapes = {name: info.shape for name, info in file.tensors.items()}
        family, config = from_gguf(str(path), file.metadata, shapes, file.load)
        tensors = {name: file.stored(name) for name in file.tensors}
        method = "gguf" if any(map(is_packed, tensors.values())) else None
        return Checkpoint(str(path), config, family, GGUF, tensors, method)
    family, config, values = _read_config(path)
    files = open_safetensors(path)
    stored, kv_scales = split_scales(str(path), {name: files.stored(name) for name in files.tensors})
    tensors, method = with_method(str(path), values.get("quantization_config"), stored)
    if any(isinstance(tensor, MicroscaledTensor) for tensor in tensors.values()):
        family = replace(family, packed_experts=True)
    return Checkpoint(str(path), config, family, HF, tensors, method, kv_scales)


def read_config(folder: FilePath) -> ModelConfig:
    """-> the config of a folder, without its tensors. Errors: ValueError."""
    return open_orbax(folder).config if is_orbax(folder) else _read_config(folder)[1]


def _read_config(folder: FilePath) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """-> family and config from a folder's config.json, and what it holds. Errors: ValueError."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model: {folder} is neither a .gguf file nor a folder with config.json")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold an object, got {type(values).__name__}")
    return *from_hugging_face(str(file), values), values


def load_params(
    checkpoint: Checkpoint | OrbaxCheckpoint,
    dtype: str,
    placed: Params | None = None,
    quantization: Quantization = WIDE,
) -> Params:
    """-> the model's parameters in `dtype`, or as `quantization` has them, read straight into their shards' memory.

    Only what this host's devices hold is read: with `placed`, a tree of `placement.Placed`, the shards of each array
    that are addressable here; without it, everything, for the default device. Beside the parameters themselves, which
    on an accelerator are not in the host's memory, that holds no more than twice the largest tensor, or one parameter
    if that is more; where shards are made of several boxes of parameters, twice that. Quantized parameters are for one
    device, the default one.

    Errors: ValueError that names missing, surplus or misshapen tensors, or a file that cannot be read.
    """
    placed = whole(checkpoint.config) if placed is None else placed
    plan = quantization.plan
    if isinstance(checkpoint, OrbaxCheckpoint):
        wide = restore(checkpoint, dtype, placed)
        return map_specs(partial(_narrow_in_place, wide, plan), param_specs(checkpoint.config)) if plan else wide
    made = recipes(checkpoint.config, checkpoint.family, checkpoint.style)
    tensors = checkpoint.tensors
    check_tensors(checkpoint.source, checkpoint.config, made, {name: t.shape for name, t in tensors.items()})
    for name in {part.tensor for recipe in made for part in recipe.parts}:
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            raise ValueError(f"{checkpoint.source}: {name} is of {tensors[name].dtype}, which is no type of weights")
    by_path = {recipe.path: recipe for recipe in made}
    largest = max(math.prod(tensor.shape) for tensor in tensors.values()) * jnp.dtype(dtype).itemsize
    arrivals = Arrivals(2 * largest)
    readable = lambda part: _readable(tensors[part.tensor])

    with Streamer() as streamer:

        def spread(placed: Placed) -> jax.Array:
            def fill(shards: Sequence[Shard]) -> None:
                boxes = [box for shard in shards for box in _boxes(placed, shard)]
                made = [(part, place(part, *box.memory)) for box in boxes for part in by_path[box.path].parts]
                streamer.fill([(readable(part), placement) for part, placement in made if placement])
                for box in boxes:
                    box.settle()

            return arrivals.make(placed.shape, placed.spec.dtype or dtype, placed.sharding, fill)

        def plain(parts: Sequence[Part], shape: tuple[int, ...], kind: str) -> jax.Array:
            def fill(shards: Sequence[Shard]) -> None:
                made = [(part, place(part, *shard)) for part in parts for shard in shards]
                streamer.fill([(readable(part), placement) for part, placement in made if placement])

            return arrivals.make(shape, kind, None, fill)

        def packed(parts: Sequence[Part], name: str, shape: tuple[int, ...], storage: Storage) -> QuantizedTensor:
            outputs, inputs = outputs_of(name, shape)
            layout, arrays = storage.layout, {}
            stored = {part.tensor: tensors[part.tensor].arrays(storage.layout) for part in parts}  # type: ignore[attr-defined]
            for array, kind in storage.arrays:
                whole = array_shape(array, outputs, inputs, layout)
                merged = layout.rows if array == "scales" else 1

                def fill(shards: Sequence[Shard], array: str = array, merged: int = merged) -> None:
                    (shard,) = shards
                    target = shard.array
                    if merged > 1:  # by output first: parts' blocks of scales may end anywhere
                        *leading, last, width = target.shape
                        target = np.empty((*leading, last * merged, width), target.dtype)
                    placed = [
                        (part, place(narrow_part(part, name, target.shape[-1]), target, [0] * target.ndim))
                        for part in parts
                    ]
                    streamer.fill([(stored[part.tensor][array], at) for part, at in placed if at])
                    if merged > 1:
                        shard.array[...] = merge_rows(target, merged, f"{checkpoint.source}: {parts[0].tensor}")

                arrays[array] = arrivals.make(whole, kind, None, fill)
            return QuantizedTensor(layout, **arrays)

        def one(placed: Placed) -> Any:
            path = placed.sources[0]
            how = plan.get(path) if path is not None else None
            if path is None or how is None:
                return spread(placed)
            assert placed.is_plain and placed.sharding is None
            if quantization.online and isinstance(how, Storage):
                return narrowed(spread(placed), INPUTS[path[-1]], how.layout)
            parts, spec = by_path[path].parts, placed.spec
            if isinstance(how, Storage):
                return packed(parts, path[-1], spec.shape, how)
            pieces = []
            for i, (first, end, storage) in enumerate(how.pieces):
                shape = (*spec.shape[: how.axis], end - first, *spec.shape[how.axis + 1 :])
                own = parts_of_piece(parts, how, i)
                pieces.append(
                    packed(own, path[-1], shape, storage) if storage else plain(own, shape, spec.dtype or dtype)
                )
            return joined(path, how, pieces)

        return map_placed(one, placed)


def _narrow_in_place(wide: Params, plan: Plan, path: Path, spec: ParamSpec) -> Any:
    """-> one parameter, quantized if the plan says so; `wide` lets go of it."""
    *way, name = path
    holder = reduce(lambda node, key: node[key], way, wide)
    storage = plan.get(path)
    if storage is None:
        return holder[name]
    assert isinstance(storage, Storage)
    return narrowed(holder.pop(name), INPUTS[name], storage.layout)


def quantization_of(
    checkpoint: Checkpoint | OrbaxCheckpoint, setting: str | None, platform: str, dtype: str
) -> Quantization:
    """-> how to store the checkpoint's parameters. Errors: ValueError for a setting that does not fit it."""
    if isinstance(checkpoint, OrbaxCheckpoint):
        return choose_quantization(setting, None, (), {}, checkpoint.config, platform, dtype)
    made = recipes(checkpoint.config, checkpoint.family, checkpoint.style)
    tensors = checkpoint.tensors
    check_tensors(checkpoint.source, checkpoint.config, made, {name: t.shape for name, t in tensors.items()})
    return choose_quantization(setting, checkpoint.method, made, tensors, checkpoint.config, platform, dtype)


def _readable(tensor: StoredTensor) -> StoredTensor:
    """-> the tensor, such that runs of it can be read quickly."""
    return expanded(tensor) if isinstance(tensor, Packed) else tensor


class _Box(NamedTuple):
    """Memory for a box of a parameter, and the part of a shard that it is for, unless it is that part already."""

    path: tuple[Any, ...]
    memory: Shard
    target: np.ndarray | None

    def settle(self) -> None:
        if self.target is not None:
            self.target[...] = self.memory.array.reshape(self.target.shape)


def _boxes(placed: Placed, shard: Shard) -> Iterator[_Box]:
    """Yields what a shard is made of; what no box fills is zero from now on. A shard of one box is filled in place."""
    array, corner = shard
    pieces = list(placed.pieces(corner, array.shape))
    if len(pieces) == 1 and not placed.stacked and array[pieces[0].at].shape == array.shape:
        yield _Box(pieces[0].path, Shard(array, pieces[0].corner), None)
        return
    array[...] = 0
    for path, start, at in pieces:
        target = array[at]
        size = target.shape[1:] if placed.stacked else target.shape
        yield _Box(path, Shard(aligned(size, array.dtype), start), target)
