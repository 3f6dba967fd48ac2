"""Owns what is on the device: compiles every step ahead of time, launches steps without waiting, collects results."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from engine.models.narrow import Plan, plan_of_few
from engine.models.params import Params
from engine.request import Request
from engine.scheduler import Row, StepPlan
from engine.slots import empty_tables, needs_slot_row, slot_row
from engine.speculation.drafter import Drafter
from engine.step import DeviceState, StepOutput, write_page_table, write_slot
from engine.step_input import (
    TABLE_ROWS,
    BatchBuilder,
    StepShape,
    choose_shape,
    flat_size,
    gpu_step_shapes,
    speculative_shapes,
    step_shapes,
    unpack,
)
from kernels.attention import choose_backend, copy_pages

COMPILERS = 16  # steps that are compiled at a time, if there are processors for them
FILLED_ROWS = 8  # sequences in one launch that shows the draft model what it has not seen
MEASURED_RUNS = 3  # of each step of decodes, the first of which may take longer
COPIES = 8  # page copies in one launch; more take several
# What XLA tries out for a GPU before it chooses. Trying everything in every step takes most of a cold start, and gains
# where products have very few rows; for the largest step a choice of cuBLAS' own is enough (docs/performance.md).
NO_TRITON: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
UNTUNED: dict[str, Any] = {"xla_gpu_autotune_level": 0, **NO_TRITON}
TUNED_TOKENS = 8  # steps of so many tokens at most are tuned in full, and with drafts of twice as many
UNLUCKY_TOKENS = 128  # where cuBLAS' first choice for Llama-8B's gate_up takes 109 us, and its best 66


def first_tokens(plan: StepPlan) -> list[int]:
    """-> where each row's sampled tokens start among the step's."""
    if not plan.speculates:
        return list(range(len(plan.rows)))
    return [0, *itertools.accumulate(1 + row.drafts for row in plan.rows)][: len(plan.rows)]


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
        drafter: Drafter | None = None,
    ):
        """Compile every step for a mesh (stage, model) while `load`, in a thread, fetches the parameters, whose
        places it is given (a tree of `placement.Placed`). Errors: ValueError, `load`'s too.

        `cache_folder`: where compiled steps are kept between processes, if at all. `peers`: the other processes whose
        devices are part of the mesh. `stored`: which parameters are so in few bits; `scaled`: they have scales of
        keys and values. `drafter`: who speculates, if any.
        """
        self.model, self.drafter, self.num_traces, self._lowering = model, drafter, 0, Lock()
        self.peers = peers
        laid_out = partial(
            StepLayout, mesh=mesh, expert_parallel=config.enable_expert_parallel, plan=stored, scaled=scaled
        )
        self.layout = laid_out(model, drafter=drafter)
        self._device = device = mesh.local_devices[0]
        in_use = (device.memory_stats() or {}).get("bytes_in_use", 0)
        params, self._dtype = self.layout.params(resolved.dtype), resolved.dtype
        page, kv_dtype = resolved.page_size, resolved.kv_cache_dtype
        specs = {*self.layout.specs, *self.layout.draft_specs}
        self.backend = choose_backend(config.attention_backend, device.platform, specs, page, kv_dtype)
        report(f"attention: {self.backend.name} on {device.device_kind}, pages of {page} tokens, KV {kv_dtype}")

        pages_per_row = -(-resolved.max_model_len // page)
        shapes = gpu_step_shapes if device.platform == "gpu" else step_shapes
        self.shapes = shapes(resolved.max_num_seqs, resolved.max_num_batched_tokens)
        if drafter is not None:
            most = drafter.config.num_speculative_tokens
            self.shapes = speculative_shapes(self.shapes, most, resolved.max_num_batched_tokens)
        self.builder = BatchBuilder(resolved.max_num_seqs, pages_per_row)
        self.page_size = page

        def state_spec(num_pages: int, layout: StepLayout = self.layout) -> DeviceState:
            dtypes, slots = (resolved.dtype, kv_dtype), resolved.max_num_seqs
            return layout.state(self.backend, num_pages, page, dtypes, slots, resolved.max_model_len)

        def counted(*arguments: Any) -> Any:
            self.num_traces += 1
            return StepLayout.step(*arguments)

        self._step = jax.jit(counted, static_argnums=(0, 1, 2, 3), donate_argnums=5)
        sizes = partial(
            plan_memory, config, resolved, device,
            in_use=in_use,
            weights=_tree_bytes(params),
            tables=_tree_bytes((state_spec(1).tables, state_spec(1).page_table)),
            page_bytes=_tree_bytes((state_spec(1).kv_caches, state_spec(1).draft_caches)),
            sharers=sum(other.process_index == device.process_index for other in jax.devices()),
        )  # fmt: skip
        grid = [mesh.shape, [other.id for other in mesh.devices.flat], config.enable_expert_parallel]
        identity = (model, resolved, self.backend.name, params, grid, drafter)
        self._cache = ExecutableCache(cache_folder, device, *identity)
        kinds = [s for s in self.shapes if not s.drafts], [s for s in self.shapes if s.drafts]
        largest = [max(kind, key=lambda s: (s.tokens, s.rows, not s.plain)) for kind in kinds if kind]
        with ThreadPoolExecutor(1, "load") as loader:
            loading = loader.submit(load, self.layout.placed)
            temporaries = 0
            if device.platform != "cpu":  # where nothing depends on them
                few = tuple(dict.fromkeys(model.layers)) * max(2, mesh.shape["stage"])
                untapped = drafter and drafter._replace(taps=(0,) * len(drafter.taps))
                own = plan_of_few(stored, model.layers, few)
                small = laid_out(replace(model, layers=few), plan=own, drafter=untapped)
                fake = state_spec(pages_per_row + 1, small)
                measure = lambda: max(_temporaries(self._compile(shape, fake, small)) for shape in largest)
                temporaries = self._cache.get_number("temporaries", measure)
            while True:
                plan = sizes(temporaries=temporaries)
                if peers is not None:
                    plan = replace(plan, num_pages=peers.agree(plan.num_pages))
                state = state_spec(plan.num_pages)
                self.executables = self._compile_all(state, plan.num_pages, loading, report)
                # Planned once: the pool hands out the pages that the cache has, whatever is in use since.
                self.memory: MemoryPlan = replace(
                    plan, temporaries=max(_temporaries(self.executables[s]) for s in largest)
                )
                if device.platform == "cpu" or self.memory.temporaries <= temporaries + RESERVE // 2:
                    break
                temporaries = self.memory.temporaries  # two layers of each kind told too little
            self.params = loading.result()
        for line in self.memory.describe(resolved.max_model_len):
            report(line)
        empty: Any = replace(state, tables=None)  # type: ignore[arg-type]
        where = jax.tree.map(lambda s: s.sharding, state)
        zeros = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), empty),
            out_shardings=replace(where, tables=None),
        )
        new_tables = partial(empty_tables, resolved.max_num_seqs, resolved.max_model_len, model.vocab_size)
        self.state = replace(zeros(), tables=jax.jit(new_tables, out_shardings=where.tables)())
        self._prepare_slots()
        if drafter is not None and drafter.config.method == "draft_model":
            self._prepare_fills()
        self.step_seconds = self._measure() if drafter is not None and drafter.config.adaptive else {}
        Thread(target=self._cache.save_new, name="save steps").start()

    def _compile(self, shape: StepShape, state: DeviceState, layout: StepLayout) -> Any:
        """-> the executable of a step of `layout`. The one that long prompts fill gets the slow-to-compile kernels."""
        fullest = shape == max(self.shapes, key=lambda s: (s.tokens, s.plain, s.rows))
        backend = self.backend if fullest else self.backend.lesser or self.backend
        options: dict[str, Any] | None = None
        few = 2 * TUNED_TOKENS if shape.drafts else TUNED_TOKENS
        if self._device.platform == "gpu" and shape.tokens > few:
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
            name = f"{shape.rows}x{shape.tokens}{'-plain' * shape.plain}-{shape.drafts}-drafts-{num_pages}-pages"
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

        tables: Any = self.state.tables, self.state.lengths
        table, of_all = self.state.page_table, self.layout.of_all
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        slot = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), tables)
        rows = ints(TABLE_ROWS, table.shape[1])
        write_pages = compiled(write_page_table, of_all, table, ints(TABLE_ROWS), rows)
        write_row = compiled(write_slot, of_all, tables, ints(), slot)
        copy = self.layout.spread(copy_pages, ((EACH, ALL), ALL, ALL), (EACH, ALL))
        both = self.state.kv_caches, self.state.draft_caches
        copy = compiled(copy, (self.layout.of_each, of_all), both, ints(COPIES), ints(COPIES))

        def run_step(shape: np.ndarray, flat: np.ndarray) -> StepOutput:
            rows, tokens, plain, drafts, follows = shape.tolist()
            executable = self.executables[StepShape(rows, tokens, bool(plain), drafts, bool(follows))]
            self.state, output = executable(self.params, self.state, flat)
            return output

        def run_write_pages(slots: np.ndarray, rows: np.ndarray) -> None:
            self.state = replace(self.state, page_table=write_pages(self.state.page_table, slots, rows))

        def run_write_slot(slot: np.ndarray, *row: np.ndarray) -> None:
            row_tree = jax.tree.unflatten(jax.tree.structure(tables), row)
            new, lengths = write_row((self.state.tables, self.state.lengths), slot, row_tree)
            self.state = replace(self.state, tables=new, lengths=lengths)

        def run_copy_pages(sources: np.ndarray, destinations: np.ndarray) -> None:
            caches, drafts = copy((self.state.kv_caches, self.state.draft_caches), sources, destinations)
            self.state = replace(self.state, kv_caches=caches, draft_caches=drafts)

        self.operations: dict[str, Callable[..., Any]] = {
            "step": run_step, "write_pages": run_write_pages, "write_slot": run_write_slot,
            "copy_pages": run_copy_pages,
        }  # fmt: skip

    def _prepare_fills(self) -> None:
        """Compile what shows the draft model tokens that it has not seen, for a few rows at a time."""
        assert self.drafter is not None and self.drafter.model is not None
        most = max(shape.tokens for shape in self.shapes if not shape.drafts)
        rows = min(FILLED_ROWS, self.builder.num_slots)
        shapes = [StepShape(rows, n, plain=True, follows=True) for n in sorted({min(64, most), most}) if n > rows]
        fill = jax.jit(StepLayout.fill, static_argnums=(0, 1, 2, 3), donate_argnums=5)
        backend, params = self.backend.lesser or self.backend, self.layout.params(self._dtype)

        def compiled(shape: StepShape) -> Any:
            arguments = self.layout, backend, self.page_size, shape, params, self.state, self.layout.flat(shape)
            name = f"fill-{shape.rows}x{shape.tokens}-{self.num_pages}-pages"
            return self._cache.get(name, lambda: fill.lower(*arguments).compile())

        self._fills = {shape: compiled(shape) for shape in shapes}

    def _fill_drafts(self, fills: Sequence[Row]) -> None:
        """Show the draft model what it has not seen, before the step that it drafts for."""
        largest, left = max(self._fills), deque(fills)
        while left:
            part = StepPlan()
            while left and len(part.rows) < largest.rows and part.num_tokens < largest.tokens:
                row = left.popleft()
                count = min(row.count, largest.tokens - part.num_tokens)
                part.rows.append(replace(row, count=count))
                part.num_tokens += count
                if count < row.count:
                    left.appendleft(replace(row, start=row.start + count, count=row.count - count))
            part.rows.sort(key=lambda row: row.count > 1)
            shape = min(shape for shape in self._fills if shape.tokens >= part.num_tokens)
            self.state = self._fills[shape](self.params, self.state, self.builder.build(part, shape))

    def _measure(self) -> dict[StepShape, float]:
        """-> seconds that each step of decodes takes, with drafts and without, made with nothing but padding."""
        seconds = {}
        for shape in self.shapes:
            if shape.rows != shape.tokens and not shape.drafts:
                continue
            flat = np.zeros(flat_size(shape), np.int32)
            unpack(flat, shape)["slots"][:] = self.builder.num_slots
            times = []
            for _ in range(MEASURED_RUNS):
                started = time.perf_counter()
                output = self.dispatch("step", np.array(shape, np.int32), flat)
                self.fetch(output.sampled.token)
                times.append(time.perf_counter() - started)
            seconds[shape] = min(times)
        return seconds

    @property
    def num_pages(self) -> int:
        """-> pages of the KV cache, page 0 included."""
        return self.memory.num_pages

    def launch(self, plan: StepPlan) -> Launched:
        """Start a step. Returns before the device has done it."""
        shape = choose_shape(self.shapes, plan, self.builder.admit(plan))
        for request in plan.admitted:
            if needs_slot_row(request) or self.drafter is not None:
                self._fill_slot(request)
        for i in range(0, len(plan.copies), COPIES):
            pairs = np.zeros((2, COPIES), np.int32)  # page 0 onto itself where there are fewer
            pairs[:, : len(plan.copies) - i] = np.transpose(plan.copies[i : i + COPIES])
            self.dispatch("copy_pages", *pairs)
        for slots, rows in self.builder.table_rows(plan):
            self.dispatch("write_pages", slots, rows)
        if plan.fills:
            self._fill_drafts(plan.fills)
        output = self.dispatch("step", np.array(shape, np.int32), self.builder.build(plan, shape))
        for part in jax.tree.leaves((output.sampled, output.runs)):
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

    def collect(self, launched: Launched) -> list[list[int]]:
        """Wait for a step. -> sampled token ids for each of the plan's rows, one or, in a step with drafts, more.

        Errors: HostLost.
        """
        tokens, runs = self.fetch(launched.output.sampled.token).tolist(), launched.output.runs
        if runs is None:
            return [[token] for token in tokens[: len(launched.plan.rows)]]
        counts = self.fetch(runs.counts).tolist()
        firsts = first_tokens(launched.plan)
        return [tokens[first : first + count] for first, count in zip(firsts, counts, strict=False)]

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
        length = [] if self.drafter is None else [np.int32(len(request.token_ids))]
        self.dispatch("write_slot", np.int32(request.slot), *jax.tree.leaves(row), *length)


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
