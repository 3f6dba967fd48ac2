"""From a configuration to a running engine: open, load, compile, and say in a few lines what came of it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.memory import limit_gpu_pool
from engine.models.narrow import abstract_narrow, describe, random_narrow
from engine.models.params import Params
from engine.runner import Runner
from engine.speculation.checkpoint import open_draft
from engine.speculative_config import read_speculative_config
from engine.tokenizer_files import load_tokenizer
from engine.weights.hub import locate
from engine.weights.load import load_params, open_checkpoint, quantization_of, read_config
from engine.weights.quantization import choose_quantization


def print_report(line: str) -> None:
    print(f"quire: {line}", file=sys.stderr, flush=True)


def start(config: EngineConfig, report: Callable[[str], None] = print_report) -> EngineCore:
    """-> the engine, compiled and ready. Errors: ValueError that names the setting, file or tensor at fault."""
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # it names each absent backend
    cache = _cache_folder(config)
    limit_gpu_pool(config)
    dummy = config.load_format == "dummy"
    path = locate(config.model, config.revision, weights=not dummy)
    checkpoint = None if dummy and path.is_dir() else open_checkpoint(path)
    model = checkpoint.config if checkpoint else read_config(path)
    platform = jax.devices()[0].platform
    resolved = config.resolve(model_max_len=model.max_model_len, platform=platform)
    model = replace(model, max_model_len=resolved.max_model_len)  # some rope scalings ask how long a sequence may get
    tokenizer = None
    if not config.skip_tokenizer_init and (config.tokenizer or not dummy):
        own = locate(config.tokenizer, weights=False, setting="tokenizer") if config.tokenizer else None
        tokenizer = load_tokenizer(own or path)
    if config.chat_template is not None:
        if tokenizer is None:
            raise ValueError("chat_template: is of no use without a tokenizer; leave it out")
        tokenizer.use_chat_template(config.chat_template)

    drafter = draft = None
    if config.speculative_config is not None:
        spec = read_speculative_config(config.speculative_config)
        draft = open_draft(spec, model, checkpoint, dummy=dummy)
        drafter = draft.drafter
    if checkpoint is None or dummy:
        quantization = choose_quantization(config.quantization, None, (), {}, model, platform, resolved.dtype)
    else:
        quantization = quantization_of(checkpoint, config.quantization, platform, resolved.dtype)

    def load() -> Params:
        began = time.perf_counter()
        if checkpoint is None or dummy:
            params = random_narrow(model, resolved.dtype, config.seed, quantization.plan)
        else:
            params = load_params(checkpoint, resolved.dtype, quantization=quantization)
        if draft is not None and draft.load is not None:
            params = params | {"draft": draft.load(resolved.dtype, config.seed)}
        report(f"model: {Path(config.model).name}, {resolved.dtype}, loaded in {time.perf_counter() - began:.1f} s")
        report(f"weights: quantization {quantization.name}: {describe(params)}")
        return params

    abstract = partial(abstract_narrow, dtype=resolved.dtype, plan=quantization.plan)
    runner = Runner(config, resolved, model, load, report, cache, abstract, drafter)
    return EngineCore(config, resolved, model, tokenizer, runner)


def _cache_folder(config: EngineConfig) -> Path | None:
    """-> where compiled steps are kept; None where the user has set up JAX's own cache. Errors: ValueError for both."""
    jax_own, ours = jax.config.jax_compilation_cache_dir, config.compilation_cache_dir  # type: ignore[attr-defined]
    if jax_own and ours:
        raise ValueError(f"compilation_cache_dir: JAX has a cache set up already, {jax_own}; leave one of the two out")
    if jax_own:
        return None
    return Path(ours) if ours else Path.home() / ".cache" / "quire"
