"""A smaller model that drafts: its keys and values are further arrays of the same pages, its steps part of the step.

It samples as the verifying model will, from its own logits with the same noise (see verify), so that greedy requests
are drafted greedily and random ones are as likely to agree as two draws of one source of chance can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from engine.models.config import ModelConfig
from engine.models.params import Params
from engine.models.transformer import forward, logits
from engine.sampler import SlotTables
from engine.speculation.rows import Rows
from engine.step import DeviceState, grow_table, ragged_batch
from engine.step_input import StepShape, unpack
from kernels.attention import Backend

Choose = Callable[[Array, Array, SlotTables], Array]  # logits [R, V], positions [R], tables -> tokens i32[R]


def propose(
    model: ModelConfig,
    backend: Backend,
    page_size: int,
    params: Params,
    caches: list[Any],
    rows: Rows,
    count: int,
    tables: SlotTables,
    choose: Choose,
) -> tuple[SlotTables, list[Any]]:
    """-> the tables with `count` tokens drafted behind each row's end, and the new caches.

    What the model knows of a sequence may end two tokens before its last, for the last draft of a step that kept all
    was never computed: so the first of the `count` steps takes two tokens.
    """
    one = jnp.arange(rows.slots.shape[0], dtype=jnp.int32)
    row, behind = jnp.repeat(one, 2), jnp.tile(jnp.array([-1, 0], jnp.int32), one.shape[0])
    runs: tuple[Array, int] | None = (2 * one, 2)
    for step in range(count):
        tokens, positions, batch = rows.spread(row, behind, tables.tokens, page_size, runs)
        hidden, caches = forward(model, backend, params, caches, tokens, positions, batch)
        hidden = hidden[1::2] if step == 0 else hidden
        token = choose(logits(model, params, hidden), rows.lengths + step, tables)
        tables = replace(tables, tokens=rows.write(tables.tokens, step, token))
        row, behind, runs = one, jnp.full_like(one, step + 1), None
    return tables, caches


def fill(
    model: ModelConfig,
    backend: Backend,
    page_size: int,
    shape: StepShape,
    params: Params,
    state: DeviceState,
    flat: Array,
) -> DeviceState:
    """Compute the draft model's keys and values of tokens that the verifying model alone has seen. As step.step."""
    part = unpack(flat, shape)
    page_table = grow_table(state.page_table, part)
    batch = ragged_batch(part, page_table, page_size)
    tokens, positions = part["tokens"], part["positions"]
    _, caches = forward(model, backend, params["draft"], state.draft_caches, tokens, positions, batch)
    return replace(state, draft_caches=caches, page_table=page_table)
