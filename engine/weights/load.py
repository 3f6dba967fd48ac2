"""From a checkpoint to the engine's parameters, one at a time: names are mapped, products fused, dtypes changed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.config import ModelConfig
from engine.models.families import Family
from engine.models.narrow_placement import Narrow, Pieces, map_stored, narrowed, stored_as
from engine.models.params import Params
from engine.models.placement import Placed, whole
from engine.models.read import from_gguf, from_hugging_face
from engine.weights.assemble import check_tensors, recipes
from engine.weights.fill import Filler
from engine.weights.gguf import open_gguf
from engine.weights.kv_scales import KVScales, split_scales
from engine.weights.methods import with_method
from engine.weights.mxfp4 import MicroscaledTensor
from engine.weights.names import GGUF, HF
from engine.weights.orbax import OrbaxCheckpoint, is_orbax, open_orbax, restore
from engine.weights.packed import is_packed
from engine.weights.quantization import Quantization, choose_quantization
from engine.weights.safetensors import open_safetensors
from engine.weights.shards import Arrivals
from engine.weights.stored import StoredTensor, read_all
from engine.weights.stream import Streamer

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
    with Streamer() as streamer:
        filler = Filler(checkpoint.source, tensors, dtype, quantization.online, Arrivals(2 * largest), streamer)
        return map_stored(lambda node: filler.make(node, parts_by_path.__getitem__), stored)


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
