"""From a checkpoint to the engine's parameters, one at a time: names are mapped, products fused, dtypes changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.config import ModelConfig
from engine.models.families import Family
from engine.models.params import Params
from engine.models.placement import Placed, map_placed, whole
from engine.models.read import from_gguf, from_hugging_face
from engine.weights.assemble import check_tensors, recipes
from engine.weights.fp8 import with_scales
from engine.weights.gguf import open_gguf
from engine.weights.mxfp4 import MicroscaledTensor, with_dequantized
from engine.weights.names import GGUF, HF
from engine.weights.orbax import OrbaxCheckpoint, is_orbax, open_orbax, restore
from engine.weights.place import place
from engine.weights.safetensors import open_safetensors
from engine.weights.shards import Arrivals, Shard, aligned
from engine.weights.stored import StoredTensor, read_all
from engine.weights.stream import Streamer


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the model it holds, and its tensors by name."""

    source: str
    config: ModelConfig
    family: Family
    style: int  # HF or GGUF: whose tensor names
    tensors: Mapping[str, StoredTensor]

    def load(self, name: str) -> np.ndarray:
        """-> a whole tensor."""
        return read_all(self.tensors[name])


def open_checkpoint(path: Path) -> Checkpoint | OrbaxCheckpoint:
    """-> the checkpoint of a .gguf file, a Hugging Face folder or a folder from `engine.convert`.

    Errors: ValueError that names file and field.
    """
    if is_orbax(path):
        return open_orbax(path)
    if path.is_file() and path.suffix == ".gguf":
        file = open_gguf(path)
        shapes = {name: info.shape for name, info in file.tensors.items()}
        family, config = from_gguf(str(path), file.metadata, shapes, file.load)
        return Checkpoint(str(path), config, family, GGUF, {name: file.stored(name) for name in file.tensors})
    family, config = _read_config(path)
    files = open_safetensors(path)
    tensors = with_dequantized(str(path), {name: files.stored(name) for name in files.tensors})
    tensors = with_scales(str(path), tensors)
    if any(isinstance(tensor, MicroscaledTensor) for tensor in tensors.values()):
        family = replace(family, packed_experts=True)
    return Checkpoint(str(path), config, family, HF, tensors)


def read_config(folder: Path) -> ModelConfig:
    """-> the config of a folder, without its tensors. Errors: ValueError."""
    return open_orbax(folder).config if is_orbax(folder) else _read_config(folder)[1]


def _read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """-> family and config from a folder's config.json. Errors: ValueError."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model: {folder} is neither a .gguf file nor a folder with config.json")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold an object, got {type(values).__name__}")
    return from_hugging_face(str(file), values)


def load_params(checkpoint: Checkpoint | OrbaxCheckpoint, dtype: str, placed: Params | None = None) -> Params:
    """-> the model's parameters in `dtype`, read from the files straight into the memory of their shards.

    Only what this host's devices hold is read: with `placed`, a tree of `placement.Placed`, the shards of each array
    that are addressable here; without it, everything, for the default device. Beside the parameters themselves, which
    on an accelerator are not in the host's memory, that holds no more than twice the largest tensor, or one parameter
    if that is more; where shards are made of several boxes of parameters, twice that.

    Errors: ValueError that names missing, surplus or misshapen tensors, or a file that cannot be read.
    """
    placed = whole(checkpoint.config) if placed is None else placed
    if isinstance(checkpoint, OrbaxCheckpoint):
        return restore(checkpoint, dtype, placed)
    made = recipes(checkpoint.config, checkpoint.family, checkpoint.style)
    tensors = checkpoint.tensors
    check_tensors(checkpoint.source, checkpoint.config, made, {name: t.shape for name, t in tensors.items()})
    for name in {part.tensor for recipe in made for part in recipe.parts}:
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            raise ValueError(f"{checkpoint.source}: {name} is of {tensors[name].dtype}, which is no type of weights")
    by_path = {recipe.path: recipe for recipe in made}
    largest = max(math.prod(tensor.shape) for tensor in tensors.values()) * jnp.dtype(dtype).itemsize
    arrivals = Arrivals(2 * largest)

    with Streamer() as streamer:

        def one(placed: Placed) -> jax.Array:
            def fill(shards: Sequence[Shard]) -> None:
                boxes = [box for shard in shards for box in _boxes(placed, shard)]
                made = [(part, place(part, *box.memory)) for box in boxes for part in by_path[box.path].parts]
                streamer.fill([(tensors[part.tensor], placement) for part, placement in made if placement])
                for box in boxes:
                    box.settle()

            return arrivals.make(placed.shape, placed.spec.dtype or dtype, placed.sharding, fill)

        return map_placed(one, placed)


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
