"""Embeddings: the hidden states of prompts after the final norm, pooled to one vector each.

A small function of its own beside the step: it runs the same paged forward over pages that it borrows from the pool,
in chunks of up to max_num_batched_tokens, between two steps. It is compiled when it is first used, once for each of a
few sizes, by all processes before any of them gives it to its devices; and it neither reads nor fills the prefix cache.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.config import ResolvedConfig
from engine.layout import ALL, EACH
from engine.models.config import ModelConfig
from engine.models.params import Params
from engine.models.transformer import forward
from engine.pages import PagePool
from engine.request import NoRoom
from engine.runner import Runner
from kernels.attention import Backend, RaggedBatch
from sharding.axes import Axes

POOLINGS = ("last", "mean", "cls")
MAX_ROWS = 8  # prompts in one call of the device
ARRAYS = tuple(field.name for field in dataclasses.fields(RaggedBatch) if field.name != "runs")  # of a batch
PARTS = (*ARRAYS, "tokens", "positions", "row_of", "weights")


@dataclass
class _Row:
    """A prompt that is being computed."""

    index: int
    tokens: Sequence[int]
    pages: list[int]
    done: int = 0  # tokens computed
    count: int = 0  # tokens in the call at hand


class Pooler:
    """Computes embeddings with the runner's model, state and pages. For the engine's thread."""

    def __init__(self, runner: Runner, pool: PagePool, resolved: ResolvedConfig):
        self.runner, self.pool = runner, pool
        self.rows = min(MAX_ROWS, resolved.max_num_seqs)
        most = max(resolved.max_num_batched_tokens, self.rows + 1)  # as many tokens as rows would mean decodes only
        self.sizes = [size for size in (16, 64, 256, 1024, 4096) if self.rows < size < most] + [most]
        layout = runner.layout
        pooled = partial(_pooled, runner.model, runner.backend, self.rows, layout.axes)
        splits = (layout.param_specs, EACH, ALL)
        self._forward = jax.jit(layout.spread(pooled, splits, (ALL, EACH)), donate_argnums=1)
        self._executables: dict[int, Any] = {}  # by size
        runner.operations |= {"embed": self._run, "compile_embed": self._compile}

    def embed(self, prompts: Sequence[Sequence[int]], pooling: str, normalize: bool) -> np.ndarray:
        """token ids of each prompt -> [prompts, hidden] float32; of length 1 with `normalize`.

        `pooling`: the hidden state of the "last" token, the "mean" of all, or that of the first ("cls"). Prompts are
        no longer than max_model_len. Errors: NoRoom; ValueError for hidden states that are not finite.
        """
        result = np.zeros((len(prompts), self.runner.model.hidden_size), np.float32)
        waiting, running = deque(enumerate(prompts)), list[_Row]()
        try:
            while waiting or running:
                while waiting and len(running) < self.rows:
                    pages = self.pool.allocate(self.pool.pages_for(len(waiting[0][1])))
                    if pages is None:
                        break
                    running.append(_Row(*waiting.popleft(), pages))
                if not running:
                    raise NoRoom
                for row, vector in self._advance(running, pooling):
                    result[row.index] += vector
                for row in [row for row in running if row.done == len(row.tokens)]:
                    running.remove(row)
                    self.pool.release(row.pages)
        finally:
            for row in running:
                self.pool.release(row.pages)
        if not np.isfinite(result).all():
            raise ValueError("the model's hidden states were not finite")
        if normalize:
            result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
        return result

    def _advance(self, running: list[_Row], pooling: str) -> list[tuple[_Row, np.ndarray]]:
        """Compute the next chunk of as many prompts as fit. -> what each adds to its vector."""
        left = self.sizes[-1]
        for row in running:
            row.count = min(len(row.tokens) - row.done, left)
            left -= row.count
        rows = sorted((row for row in running if row.count), key=lambda row: row.count != 1)  # single tokens first
        total = sum(row.count for row in rows)
        size = next(size for size in self.sizes if size >= total)

        ints = lambda count, value=0: np.full(count, value, np.int32)
        part: dict[str, Any] = dict(
            tokens=ints(size), positions=ints(size), row_of=ints(size, self.rows), weights=np.zeros(size, np.float32),
            page_table=np.zeros((self.rows, self.runner.state.page_table.shape[1]), np.int32),
            kv_lens=ints(self.rows), cu_q_lens=ints(self.rows + 1, total), write_page=ints(size),
            num_rows=ints(()) + len(rows), num_decodes=ints(()) + sum(row.count == 1 for row in rows),
        )  # fmt: skip
        at, page_size = 0, self.runner.page_size
        for i, row in enumerate(rows):
            here, end = slice(at, at + row.count), row.done + row.count
            part["tokens"][here] = row.tokens[row.done : end]
            part["positions"][here] = np.arange(row.done, end)
            part["row_of"][here] = i
            part["weights"][here] = _weights(pooling, len(row.tokens))[row.done : end]
            part["page_table"][i, : len(row.pages)] = row.pages
            part["write_page"][here] = part["page_table"][i, part["positions"][here] // page_size]
            part["kv_lens"][i], part["cu_q_lens"][i] = end, at
            at, row.done = at + row.count, end
        part["write_offset"] = part["positions"] % page_size
        runner, arrays = self.runner, [part[name] for name in PARTS]
        if size not in self._executables:
            runner.prepare("compile_embed", *arrays)
        vectors = runner.dispatch("embed", *arrays)
        return list(zip(rows, runner.fetch(vectors), strict=False))

    def _compile(self, *arrays: np.ndarray) -> None:
        """Compile what `_run` needs for arrays of these shapes."""
        runner, part = self.runner, dict(zip(PARTS, arrays, strict=True))
        lowered = self._forward.lower(runner.params, runner.state.kv_caches, part)
        self._executables[part["tokens"].size] = lowered.compile()

    def _run(self, *arrays: np.ndarray) -> Array:
        """-> one call's vectors, from the arrays that PARTS names."""
        runner, part = self.runner, dict(zip(PARTS, arrays, strict=True))
        vectors, caches = self._executables[part["tokens"].size](runner.params, runner.state.kv_caches, part)
        runner.state = replace(runner.state, kv_caches=caches)
        return vectors


def _weights(pooling: str, count: int) -> np.ndarray:
    """-> [count] float32: how much each token's hidden state counts."""
    if pooling == "mean":
        return np.full(count, 1 / count, np.float32)
    weights = np.zeros(count, np.float32)
    weights[-1 if pooling == "last" else 0] = 1
    return weights


def _pooled(
    config: ModelConfig, backend: Backend, rows: int, axes: Axes,
    params: Params, kv_caches: list[Any], part: dict[str, Any],
) -> tuple[Array, list[Any]]:  # fmt: skip
    """-> weighted sums of each row's hidden states [rows, D] float32, and the new caches.

    `part`: tokens, positions, row_of [T] i32 and weights [T] f32, and RaggedBatch's arrays under their names. Padding
    is of row `rows`, which is dropped.
    """
    batch = RaggedBatch(**{name: part[name] for name in ARRAYS})  # type: ignore[arg-type]
    hidden, kv_caches = forward(config, backend, params, kv_caches, part["tokens"], part["positions"], batch, axes)
    weights = part["weights"][:, None]
    counted = jnp.where(weights != 0, hidden.astype(jnp.float32) * weights, 0.0)
    return axes.stage.last(jax.ops.segment_sum(counted, part["row_of"], rows)), kv_caches
