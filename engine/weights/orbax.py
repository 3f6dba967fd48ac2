"""Checkpoints in the engine's own layout: an Orbax folder of parameters, and beside it what model they are of.

A folder holds `quire.json` (the format's version and the ModelConfig, written last), `params` (Orbax, not compressed:
weights hardly shrink, and reading them then is bound by the disk), and the tokenizer's files. Orbax is imported when it
is needed.
"""

from __future__ import annotations

import contextlib
import math
import operator
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from absl import logging
from jax.sharding import SingleDeviceSharding

from engine.models.check import check_config
from engine.models.config import ModelConfig
from engine.models.params import Params, ParamSpec, map_specs, param_specs
from engine.models.relay import laid_out, stored_sharding
from engine.weights.gguf import VOCABULARY_NAME, open_gguf

VERSION = 1
CONFIG_NAME, PARAMS_NAME = "quire.json", "params"
MAX_CONFIG_BYTES = 1 << 24
TOKENIZER_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class OrbaxCheckpoint:
    """An opened folder of this format: the model it holds. `restore` reads the parameters."""

    folder: Path
    config: ModelConfig


def is_orbax(folder: Path) -> bool:
    """-> whether `folder` claims to be of this format."""
    return (folder / CONFIG_NAME).is_file()


def open_orbax(folder: Path) -> OrbaxCheckpoint:
    """-> the checkpoint. Errors: ValueError that names the file and what is wrong with it."""
    file = folder / CONFIG_NAME
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"is larger than {MAX_CONFIG_BYTES} bytes")
        values = msgspec.json.decode(file.read_bytes())
        if not isinstance(values, dict) or values.get("format") != "quire":
            raise ValueError("format: is not 'quire'")
        if values.get("version") != VERSION:
            version = values.get("version")
            raise ValueError(f"version: {version!r:.40} is not supported, {VERSION} is; convert the model again")
        config = msgspec.convert(values.get("model"), ModelConfig)
        unknown = _surplus(values["model"], msgspec.to_builtins(config), "model")
        if unknown:
            raise ValueError(f"{', '.join(unknown[:5])}: unknown; the folder was made by another version")
        check_config(config)
    except (OSError, ValueError, RecursionError) as error:  # msgspec's and json's errors are ValueErrors
        raise ValueError(f"{file}: {error}") from None
    return OrbaxCheckpoint(folder, config)


def save(params: Params, config: ModelConfig, source: Path, folder: Path) -> int:
    """Write parameters, config and the tokenizer of `source` (a .gguf file or a folder). -> bytes of parameters.

    Errors: ValueError if `folder` holds something already; OSError.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _checkpointer() as checkpointer:
        checkpointer.save((folder / PARAMS_NAME).absolute(), params)
    _copy_tokenizer(source, folder)
    about = {"format": "quire", "version": VERSION, "model": msgspec.to_builtins(config)}
    (folder / CONFIG_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(about)) + b"\n")
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def check_free(folder: Path) -> None:
    """Errors: ValueError unless `folder` can be written: it does not exist, or is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; name another or remove it")


def restore(checkpoint: OrbaxCheckpoint, dtype: str, placed: Params) -> Params:
    """-> the parameters in `dtype`, each read by every host straight into its own shards.

    What lies on the mesh padded or stacked is read split over all of its devices, and laid out there.

    Errors: ValueError that names missing, surplus or misshapen parameters.
    """
    specs = param_specs(checkpoint.config)
    device = SingleDeviceSharding(jax.devices()[0])

    where = stored_sharding(placed)

    def target(path: tuple[Any, ...], spec: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or dtype), sharding=where[path] or device)

    targets = map_specs(target, specs)
    largest = max(math.prod(t.shape) * t.dtype.itemsize for t in jax.tree.leaves(targets))
    path = (checkpoint.folder / PARAMS_NAME).absolute()
    with _checkpointer(largest) as checkpointer:
        try:
            found = checkpointer.metadata(path).item_metadata
        except Exception as error:  # whatever its parsers raise at files that they can't take
            raise ValueError(f"{path}: is no Orbax checkpoint: {type(error).__name__}: {error!s:.300}") from error
        if found is None:
            raise ValueError(f"{path}: is no Orbax checkpoint, or damaged; convert the model again")
        _check_tree(path, found.tree, targets)
        from orbax.checkpoint import args, checkpoint_utils

        wanted = args.PyTreeRestore(item=targets, restore_args=checkpoint_utils.construct_restore_args(targets))
        try:
            restored = checkpointer.restore(path, args=wanted)
        except Exception as error:  # as above
            raise ValueError(f"{path}: cannot be restored: {type(error).__name__}: {error!s:.300}") from error
    sources: dict[tuple[Any, ...], jax.Array] = {}
    map_specs(lambda path, spec: sources.update({path: reduce(operator.getitem, path, restored)}), specs)
    return laid_out(sources, placed)


@contextlib.contextmanager
def _checkpointer(largest: int = 0) -> Iterator[Any]:
    """Yields Orbax's checkpointer; it reads as much at a time as two parameters of `largest` bytes, or 1 GB."""
    from orbax import checkpoint as ocp

    gigabytes = max(1, math.ceil(2 * largest / 1e9))
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, restore_concurrent_gb=gigabytes)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # it tells every step that it takes
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            yield checkpointer
    finally:
        logging.set_verbosity(verbosity)


def _check_tree(path: Path, found: Any, targets: Params) -> None:
    """Compare names and shapes of what is stored with what the config asks for. Errors: ValueError."""
    shapes = {
        jax.tree_util.keystr(keys, simple=True, separator="."): tuple(getattr(leaf, "shape", None) or ())
        for keys, leaf in jax.tree_util.tree_flatten_with_path(found)[0]
    }
    wanted = {
        jax.tree_util.keystr(keys, simple=True, separator="."): leaf.shape
        for keys, leaf in jax.tree_util.tree_flatten_with_path(targets)[0]
    }
    for what, names in (("missing", wanted.keys() - shapes.keys()), ("not part of the model", shapes.keys() - wanted)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{path}: parameters are {what}: {', '.join(sorted(names)[:5])}{more}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ValueError(f"{path}: {name} has shape {shapes[name]}, but {CONFIG_NAME} says {shape}")


def _surplus(given: Any, known: Any, where: str) -> list[str]:
    """-> the keys of nested objects that are not known."""
    if isinstance(given, dict) and isinstance(known, dict):
        unknown = sorted(f"{where}.{key}" for key in given.keys() - known.keys())
        both = sorted(given.keys() & known.keys())
        return unknown + [name for key in both for name in _surplus(given[key], known[key], f"{where}.{key}")]
    if isinstance(given, list) and isinstance(known, (list, tuple)):
        pairs = enumerate(zip(given, known, strict=True))
        return [name for i, (a, b) in pairs for name in _surplus(a, b, f"{where}.{i}")]
    return []


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if source.is_dir():
        for name in (*TOKENIZER_FILES, VOCABULARY_NAME):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    with open_gguf(source) as file:
        (folder / VOCABULARY_NAME).write_bytes(file.without_tensors())
