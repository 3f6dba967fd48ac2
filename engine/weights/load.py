"""From a checkpoint to the engine's parameters, one at a time: names are mapped, products fused, dtypes changed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.config import ModelConfig
from engine.models.families import Family
from engine.models.params import Params, ParamSpec, map_specs, param_specs
from engine.models.read import from_gguf, from_hugging_face
from engine.weights.assemble import check_tensors, recipes
from engine.weights.fp8 import with_scales
from engine.weights.gguf import open_gguf
from engine.weights.mxfp4 import MicroscaledTensor, with_dequantized
from engine.weights.names import GGUF, HF
from engine.weights.orbax import OrbaxCheckpoint, is_orbax, open_orbax, restore
from engine.weights.place import place
from engine.weights.safetensors import open_safetensors
from engine.weights.shards import Arrivals, Shard, ShardingRule
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


def load_params(checkpoint: Checkpoint | OrbaxCheckpoint, dtype: str, sharding: ShardingRule | None = None) -> Params:
    """-> the model's parameters in `dtype`, read from the files straight into the memory of their shards.

    Only what this host's devices hold is read: with `sharding`, the shards of each parameter that are addressable
    here; without it, everything, for the default device. Beside the parameters themselves, which on an accelerator are
    not in the host's memory, that holds no more than twice the largest tensor, or one parameter if that is more.

    Errors: ValueError that names missing, surplus or misshapen tensors, or a file that cannot be read.
    """
    if isinstance(checkpoint, OrbaxCheckpoint):
        return restore(checkpoint, dtype, sharding)
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

        def one(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
            def fill(shards: Sequence[Shard]) -> None:
                placed = [(part, place(part, *shard)) for part in by_path[path].parts for shard in shards]
                streamer.fill([(tensors[part.tensor], placement) for part, placement in placed if placement])

            return arrivals.make(spec.shape, spec.dtype or dtype, sharding(path, spec) if sharding else None, fill)

        return map_specs(one, param_specs(checkpoint.config))
