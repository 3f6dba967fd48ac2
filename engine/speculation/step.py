"""The step that verifies drafts: each row is one token and its drafts, in the ragged batch that a model always sees."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from engine.models.config import ModelConfig
from engine.models.params import Params
from engine.models.transformer import forward_with_taps
from engine.sampler import WANTS_LOGPROBS, SlotTables, sample
from engine.speculation import draft_model, heads, ngram
from engine.speculation.drafter import Drafter
from engine.speculation.lengths import length_of
from engine.speculation.rows import Rows
from engine.speculation.verify import Runs, forced, num_kept
from engine.step import DeviceState, StepOutput, grow_table, sample_rows, sampling_input
from engine.step_input import StepShape, unpack
from kernels.attention import Backend
from sharding.axes import ALONE, Axes


def speculating_step(
    drafter: Drafter,
    config: ModelConfig,
    backend: Backend,
    page_size: int,
    shape: StepShape,
    params: Params,
    state: DeviceState,
    flat: Array,
    axes: Axes = ALONE,
) -> tuple[DeviceState, StepOutput]:
    """Draft, then compute one step of decodes with their drafts. As step.step; what comes before `params` is static.

    Drafts are written to the table of tokens before they are verified, so that whatever sampling looks up there, such
    as what penalties count, is what it will be if they are right.
    """
    assert state.lengths is not None
    part = unpack(flat, shape)
    page_table, nowhere = grow_table(state.page_table, part), state.lengths.shape[0]
    lengths = length_of(state.lengths, part["slots"])
    ended = lengths > part["limits"]
    slots, lengths = jnp.where(ended, nowhere, part["slots"]), jnp.where(ended, 1, lengths)
    rows = Rows(slots, lengths, part["limits"], page_table)

    def choose(logits: Array, positions: Array, tables: SlotTables) -> Array:
        """Sample from a drafter's logits [R, V] as the verifying model will."""
        chosen = part | {
            "sample_positions": positions,
            "slots": slots,
            "row_flags": part["row_flags"] & ~WANTS_LOGPROBS,
        }
        return sample(logits, sampling_input(chosen), tables, num_logprobs=1, plain=shape.plain).token

    tables, caches = state.tables, state.draft_caches
    with jax.named_scope("draft"):
        count = jnp.full(shape.rows, shape.drafts, jnp.int32)
        if drafter.config.method == "ngram":
            known = tables.tokens.at[slots].get(mode="clip")
            shortest, longest = drafter.config.prompt_lookup_min, drafter.config.prompt_lookup_max
            drafts, count = ngram.propose(known, lengths, shape.drafts, shortest, longest)
            tables = replace(tables, tokens=rows.write(tables.tokens, 0, drafts))
        elif drafter.config.method == "draft_model":
            assert drafter.model is not None
            tables, caches = draft_model.propose(
                drafter.model, backend, page_size, params["draft"], caches, rows, shape.drafts, tables, choose
            )
        elif drafter.has_head:
            assert state.head_outputs is not None
            last = state.head_outputs.at[slots].get(mode="clip")
            tables, caches = heads.propose(
                drafter, config, backend, page_size, params, caches, rows, last, shape.drafts, tables, choose, axes
            )
        else:
            count = part["num_given"]
            tables = replace(tables, tokens=rows.write(tables.tokens, 0, part["given"]))
        asked = part["cu_q_lens"][1:] - part["cu_q_lens"][:-1] - 1
        count = jnp.where(ended, 0, jnp.clip(count, 0, jnp.minimum(asked, part["limits"] - lengths)))
        columns = lengths[:, None] + jnp.arange(shape.drafts, dtype=jnp.int32)[None]
        drafts = tables.tokens.at[slots[:, None], columns].get(mode="fill", fill_value=0)
        if drafter.model is not None and axes.whole.size > 1:  # each device has drafted; all must verify the same
            drafts = axes.whole.last(drafts)
            tables = replace(tables, tokens=rows.write(tables.tokens, 0, drafts))

    row = jnp.minimum(part["row_of"], shape.rows - 1)
    behind = jnp.arange(shape.tokens, dtype=jnp.int32) - part["cu_q_lens"][row]
    behind = jnp.where((part["row_of"] < shape.rows) & (behind <= count[row]), behind, page_table.size * page_size)
    runs = part["cu_q_lens"][:-1], shape.drafts + 1
    tokens, positions, batch = rows.spread(row, behind, tables.tokens, page_size, runs)
    hidden, kv_caches, tapped = forward_with_taps(
        config, backend, params, state.kv_caches, tokens, positions, batch, drafter.taps, axes
    )

    with jax.named_scope("verify"):
        each = {
            "constants": part["constants"][:, row],
            "row_flags": jnp.where(behind <= count[row], part["row_flags"][row], 0),
            "sample_positions": positions + 1,
            "slots": slots[row],
        }
        of_all = axes.stage.last(hidden)
        out = sample_rows(config, params, of_all, sampling_input(each), tables, shape.plain, axes)
        ahead = jnp.arange(shape.drafts + 1, dtype=jnp.int32)[None]
        places = jnp.where(ahead <= count[:, None], part["cu_q_lens"][:-1, None] + ahead, shape.tokens)
        sampled = out.token.at[places].get(mode="fill", fill_value=-1)
        if drafter.config.benchmark_forced_acceptance is not None:
            sampled = forced(sampled, drafts, lengths, drafter.config.benchmark_forced_acceptance)
            out = replace(out, token=out.token.at[places].set(sampled, mode="drop"))
        run = jnp.where(slots < nowhere, num_kept(sampled, drafts, count) + 1, 0)
        tables = replace(tables, tokens=rows.write(tables.tokens, 0, sampled))
        lengths = state.lengths.at[slots].set(lengths + run, mode="drop")
    outputs = state.head_outputs
    if outputs is not None:
        last = jnp.minimum(part["cu_q_lens"][:-1] + run - 1, shape.tokens - 1)
        outputs, caches = heads.observe(
            drafter, config, backend, params, caches, outputs, hidden, tapped, tables.tokens, slots[row], positions,
            batch, slots, last, axes,
        )  # fmt: skip
    state = DeviceState(kv_caches, page_table, tables, lengths, caches, outputs, state.link)
    return state, StepOutput(out, None, Runs(run, count))
