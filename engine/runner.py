"""Owns what is on the device: launches steps without waiting, and collects their results."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from engine.compiler import StepCompiler
from engine.config import EngineConfig, ResolvedConfig
from engine.hosts.join import Peers, encode
from engine.hosts.leader import Leader
from engine.hosts.wire import HostLost
from engine.layout import ALL, EACH, EMPTY
from engine.models.config import ModelConfig
from engine.models.narrow import Plan
from engine.models.params import Params
from engine.request import Request
from engine.scheduler import Row, StepPlan
from engine.slots import empty_tables, needs_slot_row, slot_row
from engine.speculation.drafter import Drafter
from engine.step import StepOutput, write_page_table, write_slot
from engine.step_input import (
    TABLE_ROWS,
    BatchBuilder,
    StepShape,
    choose_shape,
    flat_size,
    unpack,
)
from kernels.attention import copy_pages
from kernels.cuda.all_reduce import open_workspace

MEASURED_RUNS = 3  # of each step of decodes, the first of which may take longer
COPIES = 8  # page copies in one launch; more take several


def first_tokens(plan: StepPlan) -> list[int]:
    """-> where each row's sampled tokens start among the step's."""
    if not plan.speculates:
        return list(range(len(plan.rows)))
    return [0, *itertools.accumulate(1 + row.drafts for row in plan.rows)][: len(plan.rows)]


def _shape_of(numbers: np.ndarray) -> StepShape:
    rows, tokens, plain, drafts, follows = numbers.tolist()
    return StepShape(rows, tokens, bool(plain), drafts, bool(follows))


class Launched(NamedTuple):
    """A step that the device is computing."""

    plan: StepPlan
    output: StepOutput


class Runner:
    """The device's side of the engine."""

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
        self.model, self.drafter, self.peers = model, drafter, peers
        self._compiler = compiler = StepCompiler(
            config, resolved, model, mesh, report, cache_folder, stored, scaled, drafter
        )
        self.layout, self.backend, self.shapes = compiler.layout, compiler.backend, compiler.shapes
        self.page_size = resolved.page_size
        self.builder = BatchBuilder(resolved.max_num_seqs, -(-resolved.max_model_len // self.page_size))
        self.executables, self.memory, state, self.params = compiler.steps(load, peers)
        empty: Any = replace(state, tables=None, link=None)  # type: ignore[arg-type]
        where = jax.tree.map(lambda s: s.sharding, state)
        zeros = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), empty),
            out_shardings=replace(where, tables=None, link=None),
        )
        new_tables = partial(empty_tables, resolved.max_num_seqs, resolved.max_model_len, model.vocab_size)
        self._workspace = open_workspace(mesh, "model") if state.link else None
        link = self._workspace and self._workspace.link
        self.state = replace(zeros(), tables=jax.jit(new_tables, out_shardings=where.tables)(), link=link)
        self._prepare_slots()
        if drafter is not None and drafter.config.method == "draft_model":
            self._fills = compiler.fills(self.state, self.num_pages)
            self.operations["fill"] = self._run_fill
        self.step_seconds = self._measure() if drafter is not None and drafter.config.adaptive else {}
        compiler.keep()

    def _prepare_slots(self) -> None:
        """Compile the small functions that run before some steps, and name everything that the devices can do."""

        def compiled(function: Callable[..., Any], outputs: Any, *arguments: Any) -> Any:
            name = f"{function.__name__}-{self.num_pages}-pages"
            return self._compiler.small(name, function, outputs, *arguments)

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
            self.state, output = self.executables[_shape_of(shape)](self.params, self.state, flat)
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
            self.dispatch("fill", np.array(shape, np.int32), self.builder.build(part, shape))

    def _run_fill(self, shape: np.ndarray, flat: np.ndarray) -> None:
        self.state = self._fills[_shape_of(shape)](self.params, self.state, flat)

    def _measure(self) -> dict[StepShape, float]:
        """-> seconds that each step of decodes takes, with drafts and without, made with nothing but padding.

        All processes do this as they start, so that none tells the others.
        """
        seconds = {}
        for shape in self.shapes:
            if shape.rows != shape.tokens and not shape.drafts:
                continue
            flat = np.zeros(flat_size(shape), np.int32)
            unpack(flat, shape)["slots"][:] = self.builder.num_slots
            times = []
            for _ in range(MEASURED_RUNS):
                started = time.perf_counter()
                output = self.execute("step", [np.array(shape, np.int32), flat])
                self.fetch(output.sampled.token)
                times.append(time.perf_counter() - started)
            seconds[shape] = min(times)
        return seconds

    @property
    def num_traces(self) -> int:
        """-> how often a step was traced: serving adds none."""
        return self._compiler.num_traces

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

    def prepare(self, name: str, *arrays: Any) -> None:
        """Have every process do what asks nothing of the devices and may take long. Returns when all have done it.

        Errors: HostLost.
        """
        if isinstance(self.peers, Leader):
            self.peers.send({"prepare": encode(name, arrays)})
        self.execute(name, list(arrays))
        if isinstance(self.peers, Leader):
            self.peers.agree(1)

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
