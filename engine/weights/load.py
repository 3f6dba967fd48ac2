"""From a checkpoint to the engine's parameters, one at a time: names are mapped, products fused, dtypes changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engine.models.config import ModelConfig
from engine.models.families import Family, from_gguf, from_hugging_face
from engine.models.params import Params, ParamSpec, as_dtype, map_specs, param_specs
from engine.weights.assemble import check_tensors, recipes
from engine.weights.gguf import open_gguf
from engine.weights.names import GGUF, HF
from engine.weights.safetensors import open_safetensors


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the model it holds, and its tensors by name."""

    source: str
    config: ModelConfig
    family: Family
    style: int  # HF or GGUF: whose tensor names
    shapes: dict[str, tuple[int, ...]]
    load: Callable[[str], np.ndarray]


def open_checkpoint(path: Path) -> Checkpoint:
    """-> the checkpoint of a .gguf file or a Hugging Face folder. Errors: ValueError that names file and field."""
    if path.is_file() and path.suffix == ".gguf":
        file = open_gguf(path)
        shapes = {name: info.shape for name, info in file.tensors.items()}
        family, config = from_gguf(str(path), file.metadata, shapes)
        return Checkpoint(str(path), config, family, GGUF, shapes, file.load)
    family, config = read_config(path)
    files = open_safetensors(path)
    shapes = {name: info.shape for name, info in files.tensors.items()}
    return Checkpoint(str(path), config, family, HF, shapes, files.load)


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
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


def load_params(checkpoint: Checkpoint, dtype: str, put: Callable[[tuple[Any, ...], np.ndarray], jax.Array]) -> Params:
    """-> the model's parameters, each handed to `put` (path, array of the ParamSpec's shape) as soon as it is read.

    Errors: ValueError that names missing, surplus or misshapen tensors.
    """
    made = recipes(checkpoint.config, checkpoint.family, checkpoint.style)
    check_tensors(checkpoint.source, checkpoint.config, made, checkpoint.shapes)
    by_path = {recipe.path: recipe for recipe in made}

    def one(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
        return put(path, as_dtype(by_path[path].assemble(checkpoint.load), dtype))

    return map_specs(one, param_specs(checkpoint.config))
