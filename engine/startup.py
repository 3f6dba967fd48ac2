"""From a configuration to a running engine: open, load, compile, and say in a few lines what came of it."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.memory import limit_gpu_pool
from engine.models.params import Params
from engine.models.relay import random_params
from engine.replicas import Engine, Replicas
from engine.runner import Runner
from engine.tokenizer_files import load_tokenizer
from engine.weights.hub import locate
from engine.weights.load import load_params, open_checkpoint, read_config
from sharding.mesh import replica_meshes


def print_report(line: str) -> None:
    print(f"quire: {line}", file=sys.stderr, flush=True)


def start(config: EngineConfig, report: Callable[[str], None] = print_report) -> Engine:
    """-> the engine, compiled and ready. Errors: ValueError that names the setting, file or tensor at fault."""
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # it names each absent backend
    cache = _cache_folder(config)
    limit_gpu_pool(config)
    dummy = config.load_format == "dummy"
    _make_cpu_devices(config)
    path = locate(config.model, config.revision, weights=not dummy)
    checkpoint = None if dummy and path.is_dir() else open_checkpoint(path)
    model = checkpoint.config if checkpoint else read_config(path)
    resolved = config.resolve(model_max_len=model.max_model_len, platform=jax.devices()[0].platform)
    model = replace(model, max_model_len=resolved.max_model_len)  # some rope scalings ask how long a sequence may get
    tokenizer = None
    if not config.skip_tokenizer_init and (config.tokenizer or not dummy):
        own = locate(config.tokenizer, weights=False, setting="tokenizer") if config.tokenizer else None
        tokenizer = load_tokenizer(own or path)
    if config.chat_template is not None:
        if tokenizer is None:
            raise ValueError("chat_template: is of no use without a tokenizer; leave it out")
        tokenizer.use_chat_template(config.chat_template)

    def load(placed: Params) -> Params:
        began = time.perf_counter()
        if checkpoint is None or dummy:
            params = random_params(model, resolved.dtype, config.seed, placed)
        else:
            params = load_params(checkpoint, resolved.dtype, placed)
        report(f"model: {Path(config.model).name}, {resolved.dtype}, loaded in {time.perf_counter() - began:.1f} s")
        return params

    sizes = config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size
    cores = [
        EngineCore(config, resolved, model, tokenizer, Runner(config, resolved, model, mesh, load, report, cache))
        for mesh in replica_meshes(jax.devices(), *sizes)
    ]
    return cores[0] if len(cores) == 1 else Replicas(cores)


def _make_cpu_devices(config: EngineConfig) -> None:
    """Ask for as many CPU devices as the mesh has, in case there is no accelerator; too late once JAX has started."""
    size = config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size
    if size > 1:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", size)


def _cache_folder(config: EngineConfig) -> Path | None:
    """-> where compiled steps are kept; None where the user has set up JAX's own cache. Errors: ValueError for both."""
    jax_own, ours = jax.config.jax_compilation_cache_dir, config.compilation_cache_dir  # type: ignore[attr-defined]
    if jax_own and ours:
        raise ValueError(f"compilation_cache_dir: JAX has a cache set up already, {jax_own}; leave one of the two out")
    if jax_own:
        return None
    return Path(ours) if ours else Path.home() / ".cache" / "quire"
