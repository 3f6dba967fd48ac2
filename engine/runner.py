"""Owns what is on the device: compiles every step ahead of time, launches steps without waiting, collects results."""

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
from engine.hosts.join import Peers, encode
from engine.hosts.leader import Leader
from engine.hosts.wire import HostLost
from engine.layout import ALL, EACH, EMPTY, StepLayout
from engine.memory import RESERVE, MemoryPlan, plan_memory
from engine.models.config import ModelConfig
from engine.models.narrow import Plan
from engine.models.params import Params
from engine.request import Request
from engine.scheduler import StepPlan
from engine.slots import empty_tables, needs_slot_row, slot_row
from engine.step import DeviceState, StepOutput, write_page_table, write_slot
from engine.step_input import TABLE_ROWS, BatchBuilder, StepShape, choose_shape, gpu_step_shapes, step_shapes
from kernels.attention import choose_backend, copy_pages

COMPILERS = 16  # steps that are compiled at a time, if there are processors for them
COPIES = 8  # page copies in one launch; more take several
# What XLA tries out for a GPU before it chooses. Trying everything in every step takes most of a cold start, and gains
# where products have very few rows; for the largest step a choice of cuBLAS' own is enough (docs/performance.md).
NO_TRITON: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
UNTUNED: dict[str, Any] = {"xla_gpu_autotune_level": 0, **NO_TRITON}
TUNED_TOKENS = 8  # steps of so many tokens at most are tuned in full
UNLUCKY_TOKENS = 128  # where cuBLAS' first choice for Llama-8B's gate_up takes 109 us, and its best 66


class Launched(NamedTuple):
    """A step that the device is computing."""

    plan: StepPlan
    output: StepOutput


class Runner:
    """The device's side of the engine. `num_traces` counts traces of the step: serving adds none."""

    def __init__(
        self,
        config: EngineConfig,
        resolved: ResolvedConfig,
        model: ModelConfig,
        mesh: Mesh,
        load: Callable[[Params], Params],
        report: Callable[[str], None],
        cache_folder: Path | None = None,
        peers: Peers | None = None,
        stored: Plan = EMPTY,
        scaled: bool = False,
    ):
        """Compile every step for a mesh (stage, model) while `load`, in a thread, fetches the parameters, whose
        places it is given (a tree of `placement.Placed`). Errors: ValueError, `load`'s too.

        `cache_folder`: where compiled steps are kept between processes, if at all. `peers`: the other processes whose
        devices are part of the mesh. `stored`: which parameters are so in few bits; `scaled`: they have scales of
        keys and values.
        """
        self.model, self.num_traces, self._lowering = model, 0, Lock()
        self.peers = peers
        self.layout = StepLayout(model, mesh, config.enable_expert_parallel, stored, scaled)
        self._device = device = mesh.local_devices[0]
        in_use = (device.memory_stats() or {}).get("bytes_in_use", 0)
        params, self._dtype = self.layout.params(resolved.dtype), resolved.dtype
        page, kv_dtype = resolved.page_size, resolved.kv_cache_dtype
        specs = set(self.layout.specs)
        self.backend = choose_backend(config.attention_backend, device.platform, specs, page, kv_dtype)
        report(f"attention: {self.backend.name} on {device.device_kind}, pages of {page} tokens, KV {kv_dtype}")

        pages_per_row = -(-resolved.max_model_len // page)
        shapes = gpu_step_shapes if device.platform == "gpu" else step_shapes
        self.shapes = shapes(resolved.max_num_seqs, resolved.max_num_batched_tokens)
        self.builder = BatchBuilder(resolved.max_num_seqs, pages_per_row)
        self.page_size = page

        def state_spec(num_pages: int, layout: StepLayout = self.layout) -> DeviceState:
            return layout.state(self.backend, num_pages, page, kv_dtype, resolved.max_num_seqs, resolved.max_model_len)

        def counted(*arguments: Any) -> Any:
            self.num_traces += 1
            return StepLayout.step(*arguments)

        self._step = jax.jit(counted, static_argnums=(0, 1, 2, 3), donate_argnums=5)
        sizes = partial(
            plan_memory, config, resolved, device,
            in_use=in_use,
            weights=_tree_bytes(params),
            tables=_tree_bytes((state_spec(1).tables, state_spec(1).page_table)),
            page_bytes=_tree_bytes(state_spec(1).kv_caches),
            sharers=sum(other.process_index == device.process_index for other in jax.devices()),
        )  # fmt: skip
        grid = [mesh.shape, [other.id for other in mesh.devices.flat], config.enable_expert_parallel]
        identity = (model, resolved, self.backend.name, params, grid)
        self._cache = ExecutableCache(cache_folder, device, *identity)
        largest = max(self.shapes, key=lambda s: (s.tokens, s.rows, not s.plain))
        with ThreadPoolExecutor(1, "load") as loader:
            loading = loader.submit(load, self.layout.placed)
            temporaries = 0
            if device.platform != "cpu":  # where nothing depends on them
                few = tuple(dict.fromkeys(model.layers)) * max(2, mesh.shape["stage"])
                small = StepLayout(replace(model, layers=few), mesh, config.enable_expert_parallel, stored, scaled)
                measure = lambda: _temporaries(self._compile(largest, state_spec(pages_per_row + 1, small), small))
                temporaries = self._cache.get_number("temporaries", measure)
            while True:
                plan = sizes(temporaries=temporaries)
                if peers is not None:
                    plan = replace(plan, num_pages=peers.agree(plan.num_pages))
                state = state_spec(plan.num_pages)
                self.executables = self._compile_all(state, plan.num_pages, loading, report)
                # Planned once: the pool hands out the pages that the cache has, whatever is in use since.
                self.memory: MemoryPlan = replace(plan, temporaries=_temporaries(self.executables[largest]))
                if device.platform == "cpu" or self.memory.temporaries <= temporaries + RESERVE // 2:
                    break
                temporaries = self.memory.temporaries  # two layers of each kind told too little
            self.params = loading.result()
        for line in self.memory.describe(resolved.max_model_len):
            report(line)
        empty = (state.kv_caches, state.page_table)
        where = jax.tree.map(lambda s: s.sharding, state)
        zeros = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), empty),
            out_shardings=(where.kv_caches, where.page_table),
        )
        kv_caches, page_table = zeros()
        new_tables = partial(empty_tables, resolved.max_num_seqs, resolved.max_model_len, model.vocab_size)
        self.state = DeviceState(kv_caches, page_table, jax.jit(new_tables, out_shardings=where.tables)())
        self._prepare_slots()
        Thread(target=self._cache.save_new, name="save steps").start()

    def _compile(self, shape: StepShape, state: DeviceState, layout: StepLayout) -> Any:
        """-> the executable of a step of `layout`. The one that long prompts fill gets the slow-to-compile kernels."""
        fullest = shape == max(self.shapes, key=lambda s: (s.tokens, s.plain, s.rows))
        backend = self.backend if fullest else self.backend.lesser or self.backend
        options: dict[str, Any] | None = None
        if self._device.platform == "gpu" and shape.tokens > TUNED_TOKENS:
            options = NO_TRITON if fullest or shape.tokens == UNLUCKY_TOKENS else UNTUNED
        with self._lowering:  # Python's own lock makes threads that trace at once three times slower than in turn
            params = layout.params(self._dtype)
            lowered = self._step.lower(layout, backend, self.page_size, shape, params, state, layout.flat(shape))
        return lowered.compile(options)

    def _compile_all(
        self, state: DeviceState, num_pages: int, loading: Future[Params], report: Callable[[str], None]
    ) -> dict[StepShape, Any]:
        """-> every step's executable, from the cache or compiled. Gives up as soon as loading has failed."""
        started = time.perf_counter()
        report(f"compiling {len(self.shapes)} step shapes")
        executables = {}
        threads = min(os.cpu_count() or 1, COMPILERS)
        bar = tqdm(total=len(self.shapes), desc="compiling", disable=None)

        def compile_one(shape: StepShape) -> tuple[StepShape, Any]:
            if loading.done():
                loading.result()
            name = f"{shape.rows}x{shape.tokens}{'-plain' * shape.plain}-{num_pages}-pages"
            return shape, self._cache.get(name, lambda: self._compile(shape, state, self.layout))

        slow_first = sorted(self.shapes, key=lambda s: (s.tokens > TUNED_TOKENS, -s.tokens, not s.plain))
        with _no_garbage_collection(), ThreadPoolExecutor(threads) as pool, bar:
            for shape, executable in pool.map(compile_one, slow_first):
                executables[shape] = executable
                bar.update()
        report(f"compiled {len(self.shapes)} step shapes in {time.perf_counter() - started:.1f} s")
        return executables

    def _prepare_slots(self) -> None:
        """Compile the small functions that run before some steps, and name everything that the devices can do."""

        def compiled(function: Callable[..., Any], outputs: Any, *arguments: Any) -> Any:
            lower = jax.jit(function, donate_argnums=0, out_shardings=outputs).lower
            return self._cache.get(f"{function.__name__}-{self.num_pages}-pages", lambda: lower(*arguments).compile())

        tables, table, of_all = self.state.tables, self.state.page_table, self.layout.of_all
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        slot = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), tables)
        rows = ints(TABLE_ROWS, table.shape[1])
        write_pages = compiled(write_page_table, of_all, table, ints(TABLE_ROWS), rows)
        write_row = compiled(write_slot, of_all, tables, ints(), slot)
        copy = self.layout.spread(copy_pages, (EACH, ALL, ALL), EACH)
        copy = compiled(copy, self.layout.of_each, self.state.kv_caches, ints(COPIES), ints(COPIES))

        def run_step(shape: np.ndarray, flat: np.ndarray) -> StepOutput:
            rows, tokens, plain = shape.tolist()
            self.state, output = self.executables[StepShape(rows, tokens, bool(plain))](self.params, self.state, flat)
            return output

        def run_write_pages(slots: np.ndarray, rows: np.ndarray) -> None:
            self.state = replace(self.state, page_table=write_pages(self.state.page_table, slots, rows))

        def run_write_slot(slot: np.ndarray, *row: np.ndarray) -> None:
            row_tree = jax.tree.unflatten(jax.tree.structure(tables), row)
            self.state = replace(self.state, tables=write_row(self.state.tables, slot, row_tree))

        def run_copy_pages(sources: np.ndarray, destinations: np.ndarray) -> None:
            self.state = replace(self.state, kv_caches=copy(self.state.kv_caches, sources, destinations))

        self.operations: dict[str, Callable[..., Any]] = {
            "step": run_step, "write_pages": run_write_pages, "write_slot": run_write_slot,
            "copy_pages": run_copy_pages,
        }  # fmt: skip

    @property
    def num_pages(self) -> int:
        """-> pages of the KV cache, page 0 included."""
        return self.memory.num_pages

    def launch(self, plan: StepPlan) -> Launched:
        """Start a step. Returns before the device has done it."""
        shape = choose_shape(self.shapes, plan, self.builder.admit(plan))
        for request in plan.admitted:
            if needs_slot_row(request):
                self._fill_slot(request)
        for i in range(0, len(plan.copies), COPIES):
            pairs = np.zeros((2, COPIES), np.int32)  # page 0 onto itself where there are fewer
            pairs[:, : len(plan.copies) - i] = np.transpose(plan.copies[i : i + COPIES])
            self.dispatch("copy_pages", *pairs)
        for slots, rows in self.builder.table_rows(plan):
            self.dispatch("write_pages", slots, rows)
        output = self.dispatch("step", np.array(shape, np.int32), self.builder.build(plan, shape))
        for part in jax.tree.leaves(output.sampled):
            part.copy_to_host_async()
        return Launched(plan, output)

    def dispatch(self, name: str, *arrays: Any) -> Any:
        """Give work to the devices, here and in every other process. -> what it makes. Errors: HostLost."""
        if isinstance(self.peers, Leader):
            self.peers.send(encode(name, arrays))
            self.peers.began(lambda: False)  # on a CPU, the call itself may wait for the others
        made = self.execute(name, list(arrays))
        if isinstance(self.peers, Leader):
            self.peers.began(lambda: True if made is None else jax.tree.leaves(made)[0].is_ready())
        return made

    def execute(self, name: str, arrays: list[Any]) -> Any:
        """Give work to the devices of this process. -> what it makes."""
        try:
            return self.operations[name](*arrays)
        except jax.errors.JaxRuntimeError as error:
            raise self._lost(error) from None

    def is_done(self, launched: Launched) -> bool:
        """-> whether `collect` would not wait."""
        return launched.output.sampled.token.is_ready()  # pyright: ignore[reportAttributeAccessIssue]

    def collect(self, launched: Launched) -> np.ndarray:
        """Wait for a step. -> sampled token ids, one for each of the plan's rows. Errors: HostLost."""
        return self.fetch(launched.output.sampled.token)[: len(launched.plan.rows)]

    def fetch(self, array: Any) -> np.ndarray:
        """Wait for an array that every device has whole. Errors: HostLost."""
        if not isinstance(self.peers, Leader):
            return np.asarray(array)
        self.peers.wait(array.is_ready)
        try:
            return np.asarray(array)
        except jax.errors.JaxRuntimeError as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> Exception:
        """-> what to raise when the devices fail: in company, it is most likely another host that did."""
        if not isinstance(self.peers, Leader):
            return error
        return self.peers.fail(HostLost(f"a step has failed: {error!s:.300}".splitlines()[0]))

    def close(self) -> None:
        """Let the other processes end; nothing is launched after this."""
        if isinstance(self.peers, Leader) and self.peers.failure is None:
            self.peers.close()
            jax.distributed.shutdown()

    def _fill_slot(self, request: Request) -> None:
        row = slot_row(request, self.state.tables.tokens.shape[1], self.model.vocab_size)
        assert request.slot is not None
        self.dispatch("write_slot", np.int32(request.slot), *jax.tree.leaves(row))


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
