"""From a configuration to a running engine: open, load, compile, and say in a few lines what came of it."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.hosts.follower import Follower
from engine.hosts.join import Peers, follow, identity, joined
from engine.hosts.wire import HostLost
from engine.kv_scales import wanted, with_scales
from engine.memory import limit_gpu_pool, ram_bytes
from engine.models.config import ModelConfig
from engine.models.narrow import describe
from engine.models.narrow_placement import abstract_narrow, random_narrow, unpacked
from engine.models.params import Params
from engine.models.placement import on_all, whole
from engine.replicas import Engine, Replicas
from engine.runner import Runner
from engine.speculation.checkpoint import open_draft
from engine.speculative_config import read_speculative_config
from engine.tokenizer_files import load_tokenizer
from engine.weights.hub import locate
from engine.weights.load import Checkpoint, load_params, open_checkpoint, quantization_of, read_config
from engine.weights.quantization import Quantization, choose_quantization
from sharding.mesh import replica_meshes
from sharding.topology import choose, read_topology


def print_report(line: str) -> None:
    print(f"quire: {line}", file=sys.stderr, flush=True)


def start(config: EngineConfig, report: Callable[[str], None] = print_report, *, together: bool = False) -> Engine:
    """-> the engine, compiled and ready. Errors: ValueError that names the setting, file or tensor at fault.

    In every process but the first of several, this does not return: it follows the first one, then ends the process.
    It does return if all processes are to make their calls `together` (hosts.calls).
    """
    _make_cpu_devices(config)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # it names each absent backend
    if config.num_processes is None:
        return _start(config, None, together, report)
    with joined(config, report) as peers:
        engine = _start(config, peers, together, report)
        peers.agree(1)  # everybody has loaded and compiled
        peers.is_ready = True
        if isinstance(peers, Follower) and not together:
            assert isinstance(engine, EngineCore)
            report(f"process {config.process_id} follows process 0")
            if (message := follow(peers, engine.runner.execute)) is not None:
                raise HostLost(f"process 0 said {message!r:.80}, and no command")
            sys.exit(0)
        return engine


def _start(config: EngineConfig, peers: Peers | None, together: bool, report: Callable[[str], None]) -> Engine:
    cache = None if peers else _cache_folder(config)
    limit_gpu_pool(config)
    dummy = config.load_format == "dummy"
    path = locate(config.model, config.revision, weights=not dummy)
    checkpoint = None if dummy and path.is_dir() else open_checkpoint(path)
    model = checkpoint.config if checkpoint else read_config(path)
    if peers is not None:
        peers.compare(identity(config, path, together))
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

    def store(setting: str | None) -> Quantization:
        if checkpoint is None or dummy:
            return choose_quantization(setting, None, (), {}, model, platform, resolved.dtype)
        return quantization_of(checkpoint, setting, platform, resolved.dtype)

    sizes = _parallel_sizes(config, model, resolved.dtype, report)
    quantization = store(config.quantization)
    kv_scales = checkpoint.kv_scales if isinstance(checkpoint, Checkpoint) and not dummy else {}
    scaled = wanted(model, resolved.kv_cache_dtype, kv_scales)
    drafter = draft = None
    if config.speculative_config is not None:
        spec = read_speculative_config(config.speculative_config)
        draft = open_draft(spec, model, checkpoint, dummy=dummy, kv_dtype=resolved.kv_cache_dtype)
        drafter = draft.drafter

    def load(mesh: Mesh, placed: Params) -> Params:
        began = time.perf_counter()
        if checkpoint is None or dummy:
            params = random_narrow(model, resolved.dtype, config.seed, placed, quantization.plan)
        else:
            params = load_params(checkpoint, resolved.dtype, placed, quantization)
        if scaled:
            params = with_scales(model, resolved.dtype, params, kv_scales, config.seed, mesh)
            report(f"KV cache: scales of each head {'from the checkpoint' if kv_scales else 'measured'}")
        if draft is not None and draft.load is not None:
            params = params | {"draft": jax.device_put(draft.load(resolved.dtype, config.seed), on_all(mesh))}
        report(f"model: {Path(config.model).name}, {resolved.dtype}, loaded in {time.perf_counter() - began:.1f} s")
        report(f"weights: quantization {quantization.name}: {describe(params)}")
        if wide := unpacked(placed, quantization.plan):
            named = ", ".join(wide[:4]) + ", …" * (len(wide) > 4)
            report(f"weights: {len(wide)} are unpacked, for stages have them in different formats: {named}")
        return params

    def engine(mesh: Mesh) -> EngineCore:
        own = partial(load, mesh)
        runner = Runner(config, resolved, model, mesh, own, report, cache, peers, quantization.plan, scaled, drafter)
        return EngineCore(config, resolved, model, tokenizer, runner)

    cores = [engine(mesh) for mesh in replica_meshes(jax.devices(), *sizes)]
    return cores[0] if len(cores) == 1 else Replicas(cores)


def _parallel_sizes(
    config: EngineConfig, model: ModelConfig, dtype: str, report: Callable[[str], None]
) -> tuple[int, int, int]:
    """-> how many devices share a layer, how many stages there are, and how many replicas."""
    if config.parallel == "manual":
        return config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size
    devices, local = jax.devices(), jax.local_devices()[0]
    memory = (local.memory_stats() or {}).get("bytes_limit") or ram_bytes() // len(jax.local_devices())
    leaves = jax.tree.leaves(abstract_narrow(whole(model), dtype, {}))
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    chosen = choose(
        read_topology(devices), weights, memory, model.num_kv_heads, len(model.layers), config.num_processes or 1
    )
    report(f"parallel: TP {chosen[0]} x PP {chosen[1]} x DP {chosen[2]} on {len(devices)} devices: {chosen.reason}")
    return chosen[:3]


def _make_cpu_devices(config: EngineConfig) -> None:
    """Ask for as many CPU devices as the mesh has, in case there is no accelerator; too late once JAX has started."""
    size = config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size
    size = -(-size // (config.num_processes or 1))  # of this process
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
