"""From a checkpoint to the engine's parameters, one at a time: names are mapped, products fused, dtypes changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.config import ModelConfig
from engine.models.families import Family
from engine.models.narrow_placement import Narrow, Pieces, PlacedArray, map_stored, narrowed, stored_as
from engine.models.params import Params
from engine.models.placement import Path, Placed, whole
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
PartsOf = Callable[[Path], Sequence[Part]]  # a parameter's path -> what it is made of


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
    if that is more; where shards are made of several boxes of parameters, twice that.

    Errors: ValueError that names missing, surplus or misshapen tensors, or a file that cannot be read; as stored_as.
    """
    placed = whole(checkpoint.config) if placed is None else placed
    stored = stored_as(placed, quantization.plan)
    if isinstance(checkpoint, OrbaxCheckpoint):
        return _narrow_in_place(restore(checkpoint, dtype, placed), stored)
    made = recipes(checkpoint.config, checkpoint.family, checkpoint.style)
    tensors = checkpoint.tensors
    check_tensors(checkpoint.source, checkpoint.config, made, {name: t.shape for name, t in tensors.items()})
    for name in {part.tensor for recipe in made for part in recipe.parts}:
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            raise ValueError(f"{checkpoint.source}: {name} is of {tensors[name].dtype}, which is no type of weights")
    parts_by_path = {recipe.path: recipe.parts for recipe in made}
    largest = max(math.prod(tensor.shape) for tensor in tensors.values()) * jnp.dtype(dtype).itemsize
    arrivals = Arrivals(2 * largest)
    readable = lambda part: _readable(tensors[part.tensor])

    with Streamer() as streamer:

        def wide(placed: Placed, parts_of: PartsOf) -> jax.Array:
            def fill(shards: Sequence[Shard]) -> None:
                boxes = [box for shard in shards for box in _boxes(placed, shard)]
                made = [(part, place(part, *box.memory)) for box in boxes for part in parts_of(box.path)]
                streamer.fill([(readable(part), placement) for part, placement in made if placement])
                for box in boxes:
                    box.settle()

            return arrivals.make(placed.shape, placed.spec.dtype or dtype, placed.sharding, fill)

        def packed(node: Narrow, parts_of: PartsOf) -> QuantizedTensor:
            layout, arrays = node.storage.layout, {}
            names = {part.tensor for path in node.wide.sources if path is not None for part in parts_of(path)}
            stored = {name: tensors[name].arrays(layout) for name in names}  # type: ignore[attr-defined]
            for array in node.arrays:

                def fill(shards: Sequence[Shard], array: PlacedArray = array) -> None:
                    boxes = [box for shard in shards for box in _boxes(array, shard, array.rows)]
                    placed = [
                        (part, place(narrow_part(part, node.parameter, array.source_width), *box.memory))
                        for box in boxes
                        for part in parts_of(box.path)
                    ]
                    streamer.fill([(stored[part.tensor][array.name], at) for part, at in placed if at])
                    for box in boxes:
                        box.settle(f"{checkpoint.source}: {parts_of(box.path)[0].tensor}")

                arrays[array.name] = arrivals.make(array.shape, array.dtype, array.sharding, fill)
            return QuantizedTensor(layout, **arrays)

        def one(node: Placed | Narrow | Pieces, parts_of: PartsOf = parts_by_path.__getitem__) -> Any:
            if isinstance(node, Placed):
                return wide(node, parts_of)
            if isinstance(node, Narrow):
                return narrowed(wide(node.wide, parts_of), node) if quantization.online else packed(node, parts_of)
            own = lambda i: lambda path: parts_of_piece(parts_of(path), node.how, i)
            return node.joined([one(piece, own(i)) for i, piece in enumerate(node.pieces)])

        return map_stored(one, stored)


def _narrow_in_place(wide: Params, stored: Params) -> Params:
    """-> the parameters, quantized one by one as `stored` says; `wide` lets go of them."""

    def one(keys: tuple[Any, ...], node: Placed | Narrow | Pieces) -> Any:
        *way, name = (getattr(key, "key", getattr(key, "idx", "")) for key in keys)
        holder = reduce(lambda tree, key: tree[key], way, wide)
        assert not isinstance(node, Pieces)
        return narrowed(holder.pop(name), node) if isinstance(node, Narrow) else holder[name]

    is_leaf = lambda node: isinstance(node, (Placed, Narrow, Pieces))
    return jax.tree_util.tree_map_with_path(one, stored, is_leaf=is_leaf)


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
