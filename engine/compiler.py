"""Compiles every step ahead of time, while the parameters are loaded, for as many pages as memory then has room for."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from engine.config import EngineConfig, ResolvedConfig
from engine.executables import ExecutableCache
from engine.hosts.join import Peers
from engine.layout import EMPTY, StepLayout
from engine.memory import RESERVE, MemoryPlan, free_in_one_piece, plan_memory
from engine.models.config import ModelConfig
from engine.models.narrow import Plan, plan_of_few
from engine.models.params import Params
from engine.speculation.drafter import Drafter
from engine.step import DeviceState
from engine.step_input import StepShape, gpu_step_shapes, speculative_shapes, step_shapes
from kernels.attention import choose_backend

COMPILERS = 16  # steps that are compiled at a time, if there are processors for them
FILLED_ROWS = 8  # sequences in one launch that shows the draft model what it has not seen
# XLA takes a cache that kernels update in place for another one with each update. To make room for those, it would
# compute again what is used twice: products with a draft model's weights, thirteen of its LM head instead of four.
ON_GPU: dict[str, Any] = {"xla_disable_hlo_passes": "rematerialization"}
# For steps in halves, over several GPUs: while one half is added up, the other is computed, in products of its own.
OVERLAPPED: dict[str, Any] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_disable_hlo_passes": f"{ON_GPU['xla_disable_hlo_passes']},dot-merger",
}
# What XLA tries out for a GPU before it chooses. Trying everything in every step takes most of a cold start, and gains
# where products have very few rows; for the largest step a choice of cuBLAS' own is enough (docs/performance.md).
NO_TRITON: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
UNTUNED: dict[str, Any] = {"xla_gpu_autotune_level": 0, **NO_TRITON}
TUNED_TOKENS = 8  # steps of so many tokens at most are tuned in full, and with drafts of twice as many
UNLUCKY_TOKENS = 128  # where cuBLAS' first choice for Llama-8B's gate_up takes 109 us, and its best 66


class Compiled(NamedTuple):
    """Every step's executable, what they are for, and the parameters that were loaded meanwhile."""

    executables: dict[StepShape, Any]
    memory: MemoryPlan
    state: DeviceState  # shapes, dtypes and shardings
    params: Params


class StepCompiler:
    """Knows what a model's steps are compiled for: their shapes, the attention backend and what lies where.

    `num_traces` counts traces of the step.
    """

    def __init__(
        self,
        config: EngineConfig,
        resolved: ResolvedConfig,
        model: ModelConfig,
        mesh: Mesh,
        report: Callable[[str], None],
        cache_folder: Path | None = None,
        stored: Plan = EMPTY,
        scaled: bool = False,
        drafter: Drafter | None = None,
    ):
        """As Runner's. Errors: ValueError for a backend or a mesh that does not fit the model."""
        self._config, self._resolved, self._report = config, resolved, report
        self._lowering, self.num_traces = Lock(), 0
        self._laid_out = partial(
            StepLayout, mesh=mesh, expert_parallel=config.enable_expert_parallel, plan=stored, scaled=scaled,
            custom_all_reduce=not config.disable_custom_all_reduce,
        )  # fmt: skip
        self.layout = self._laid_out(model, drafter=drafter)
        self._device = device = mesh.local_devices[0]
        self._platform = device.platform
        self._options = ON_GPU if device.platform == "gpu" else {}
        self._in_use = (device.memory_stats() or {}).get("bytes_in_use", 0)
        page, kv_dtype = resolved.page_size, resolved.kv_cache_dtype
        specs = {*self.layout.specs, *self.layout.draft_specs}
        self.backend = choose_backend(config.attention_backend, device.platform, specs, page, kv_dtype)
        report(f"attention: {self.backend.name} on {device.device_kind}, pages of {page} tokens, KV {kv_dtype}")
        if self._platform == "gpu" and mesh.shape["model"] > 1:
            report(f"sums over devices: {'a kernel, over NVLink' if self.layout.has_link else 'XLA'}")

        one_row = bool(stored) and drafter is None
        shapes = partial(gpu_step_shapes, one_row=one_row) if device.platform == "gpu" else step_shapes
        self.shapes = shapes(resolved.max_num_seqs, resolved.max_num_batched_tokens)
        if drafter is not None:
            most = drafter.config.num_speculative_tokens
            self.shapes = speculative_shapes(self.shapes, most, resolved.max_num_batched_tokens)

        def counted(*arguments: Any) -> Any:
            self.num_traces += 1
            return StepLayout.step(*arguments)

        self._step = jax.jit(counted, static_argnums=(0, 1, 2, 3), donate_argnums=5)
        grid = [
            mesh.shape,
            [other.id for other in mesh.devices.flat],
            config.enable_expert_parallel,
            self.layout.has_link,
        ]
        identity = (model, resolved, self.backend.name, self.layout.params(resolved.dtype), grid, drafter)
        self._cache = ExecutableCache(cache_folder, device, *identity)

    def steps(self, load: Callable[[Params], Params], peers: Peers | None) -> Compiled:
        """Compile every step while `load`, in a thread, fetches the parameters, whose places it is given.

        Errors: ValueError where memory does not suffice, and `load`'s.
        """
        config, resolved, device, layout = self._config, self._resolved, self._device, self.layout
        one_page = self._state(1, layout)
        sizes = partial(
            plan_memory, config, resolved, device,
            in_use=self._in_use,
            weights=_tree_bytes(layout.params(resolved.dtype)),
            tables=_tree_bytes((one_page.tables, one_page.page_table)),
            page_bytes=_tree_bytes((one_page.kv_caches, one_page.draft_caches)),
            sharers=sum(other.process_index == device.process_index for other in jax.devices()),
        )  # fmt: skip
        kinds = [s for s in self.shapes if not s.drafts], [s for s in self.shapes if s.drafts]
        largest = [max(kind, key=lambda s: (s.tokens, s.rows, not s.plain)) for kind in kinds if kind]
        with ThreadPoolExecutor(1, "load") as loader:
            loading = loader.submit(load, layout.placed)
            temporaries, free = 0, None
            if self._platform != "cpu":  # where nothing depends on them
                measure = lambda: self._temporaries_of_few_layers(largest)
                temporaries = self._cache.get_number("temporaries", measure)
            if self._platform == "gpu" and layout.plan:
                # Quantizing left holes between the weights, into which no layer's cache fits.
                jax.block_until_ready(loading.result())
                free = free_in_one_piece(device)
            while True:
                plan = sizes(temporaries=temporaries, free=free)
                if peers is not None:
                    plan = replace(plan, num_pages=peers.agree(plan.num_pages))
                state = self._state(plan.num_pages, layout)
                executables = self._compile_all(state, plan.num_pages, loading)
                # Planned once: the pool hands out the pages that the cache has, whatever is in use since.
                memory = replace(plan, temporaries=max(map(_temporaries, executables.values())))
                if self._platform == "cpu" or memory.temporaries <= temporaries + RESERVE // 2:
                    break
                # Two layers told too little, or a smaller step needs more: it may unpack weights that others do not.
                temporaries = memory.temporaries
            params = loading.result()
        for line in memory.describe(resolved.max_model_len):
            self._report(line)
        return Compiled(executables, memory, state, params)

    def small(self, name: str, function: Callable[..., Any], outputs: Any, *arguments: Any) -> Any:
        """-> the executable of a function that runs before some steps, which donates its first argument.

        `name` tells it from all others, the number of pages included; `outputs`: their shardings.
        """
        lower = jax.jit(function, donate_argnums=0, out_shardings=outputs).lower
        return self._cache.get(name, lambda: lower(*arguments).compile())

    def fills(self, state: DeviceState, num_pages: int) -> dict[StepShape, Any]:
        """-> what shows the draft model tokens that it has not seen, for a few rows at a time."""
        assert self.layout.drafter is not None and self.layout.drafter.model is not None
        most = max(shape.tokens for shape in self.shapes if not shape.drafts)
        rows = min(FILLED_ROWS, self._resolved.max_num_seqs)
        shapes = [StepShape(rows, n, plain=True, follows=True) for n in sorted({min(64, most), most}) if n > rows]
        fill = jax.jit(StepLayout.fill, static_argnums=(0, 1, 2, 3), donate_argnums=5)
        backend, params = self.backend.lesser or self.backend, self.layout.params(self._resolved.dtype)

        def compiled(shape: StepShape) -> Any:
            arguments = self.layout, backend, self._resolved.page_size, shape, params, state, self.layout.flat(shape)
            name = f"fill-{shape.rows}x{shape.tokens}-{num_pages}-pages"
            return self._cache.get(name, lambda: fill.lower(*arguments).compile(self._options))

        return {shape: compiled(shape) for shape in shapes}

    def keep(self) -> None:
        """Write to disk what was compiled, in a thread."""
        Thread(target=self._cache.save_new, name="save steps").start()

    def _state(self, num_pages: int, layout: StepLayout) -> DeviceState:
        """-> shapes, dtypes and shardings of what lives on the device."""
        resolved = self._resolved
        page, dtypes = resolved.page_size, (resolved.dtype, resolved.kv_cache_dtype)
        return layout.state(self.backend, num_pages, page, dtypes, resolved.max_num_seqs, resolved.max_model_len)

    def _temporaries_of_few_layers(self, largest: list[StepShape]) -> int:
        """-> bytes that the largest steps need beside state and parameters, as a model of two layers of each kind
        tells: they hardly depend on how many there are, and compile in a fraction of the time."""
        model, mesh, drafter = self.layout.model, self.layout.mesh, self.layout.drafter
        few = tuple(dict.fromkeys(model.layers)) * max(2, mesh.shape["stage"])
        untapped = drafter and drafter._replace(taps=(0,) * len(drafter.taps))
        plan = plan_of_few(self.layout.plan, model.layers, few)
        small = self._laid_out(replace(model, layers=few), plan=plan, drafter=untapped)
        fake = self._state(-(-self._resolved.max_model_len // self._resolved.page_size) + 1, small)
        return max(_temporaries(self._compile(shape, fake, small)) for shape in largest)

    def _compile(self, shape: StepShape, state: DeviceState, layout: StepLayout) -> Any:
        """-> the executable of a step of `layout`. The one that long prompts fill gets the slow-to-compile kernels."""
        fullest = shape == max(self.shapes, key=lambda s: (s.tokens, s.plain, s.rows))
        backend = self.backend if fullest else self.backend.lesser or self.backend
        options = self._options
        few = 2 * TUNED_TOKENS if shape.drafts else TUNED_TOKENS
        if self._platform == "gpu" and shape.tokens > few:
            options = options | (NO_TRITON if fullest or shape.tokens == UNLUCKY_TOKENS else UNTUNED)
        if layout.step_axes(shape).is_overlapped:
            options = options | OVERLAPPED
        with self._lowering:  # Python's own lock makes threads that trace at once three times slower than in turn
            params = layout.params(self._resolved.dtype)
            lowered = self._step.lower(
                layout, backend, self._resolved.page_size, shape, params, state, layout.flat(shape)
            )
        return lowered.compile(options)

    def _compile_all(self, state: DeviceState, num_pages: int, loading: Future[Params]) -> dict[StepShape, Any]:
        """-> every step's executable, from the cache or compiled. Gives up as soon as loading has failed."""
        started = time.perf_counter()
        self._report(f"compiling {len(self.shapes)} step shapes")
        executables = {}
        threads = min(os.cpu_count() or 1, COMPILERS)
        bar = tqdm(total=len(self.shapes), desc="compiling", disable=None)

        def compile_one(shape: StepShape) -> tuple[StepShape, Any]:
            if loading.done():
                loading.result()
            name = f"{shape.rows}x{shape.tokens}{'-plain' * shape.plain}-{shape.drafts}-drafts-{num_pages}-pages"
            return shape, self._cache.get(name, lambda: self._compile(shape, state, self.layout))

        slow_first = sorted(self.shapes, key=lambda s: (s.tokens > TUNED_TOKENS, -s.tokens, not s.plain))
        with _no_garbage_collection(), ThreadPoolExecutor(threads) as pool, bar:
            for shape, executable in pool.map(compile_one, slow_first):
                executables[shape] = executable
                bar.update()
        self._report(f"compiled {len(self.shapes)} step shapes in {time.perf_counter() - started:.1f} s")
        return executables


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes objects by the million, and looking for garbage among them takes a third of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _temporaries(executable: Any) -> int:
    """-> bytes that a step needs beside its inputs and its donated state."""
    analysis = executable.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def _tree_bytes(tree: Any) -> int:
    """-> bytes that one device has of the arrays."""
    own = lambda leaf: leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return sum(int(np.prod(own(leaf))) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
