"""The step that verifies drafts: each row is one token and its drafts, in the ragged batch that a model always sees."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from engine.models.config import ModelConfig
from engine.models.params import Params
from engine.models.transformer import forward, logits
from engine.request import MAX_LOGPROBS
from engine.sampler import sample
from engine.speculation import ngram
from engine.speculation.drafter import Drafter
from engine.speculation.lengths import length_of
from engine.speculation.verify import Runs, forced, num_kept
from engine.step import DeviceState, StepOutput, grow_table, sampling_input
from engine.step_input import StepShape, unpack
from kernels.attention import Backend, RaggedBatch


def speculating_step(
    drafter: Drafter,
    config: ModelConfig,
    backend: Backend,
    page_size: int,
    shape: StepShape,
    params: Params,
    state: DeviceState,
    flat: Array,
) -> tuple[DeviceState, StepOutput]:
    """Draft, then compute one step of decodes with their drafts. As step.step; what comes before `params` is static.

    Drafts are written to the table of tokens before they are verified, so that whatever sampling looks up there, such
    as what penalties count, is what it will be if they are right.
    """
    assert state.lengths is not None
    part = unpack(flat, shape)
    page_table = grow_table(state.page_table, part)
    lengths = length_of(state.lengths, part["slots"])
    nowhere = state.lengths.shape[0]
    ended = lengths > part["limits"]
    slots = jnp.where(ended, nowhere, part["slots"])
    lengths = jnp.where(ended, 1, lengths)

    with jax.named_scope("draft"):
        drafts, num_drafts = _drafts(drafter, part, state, slots, lengths)
        asked = part["cu_q_lens"][1:] - part["cu_q_lens"][:-1] - 1
        num_drafts = jnp.clip(num_drafts, 0, jnp.minimum(asked, part["limits"] - lengths))
        num_drafts = jnp.where(ended, 0, num_drafts)
    tokens = _write(state.tables.tokens, slots, lengths, drafts, num_drafts)

    # Each token is a row of its own for attention: it reads what the rows before it write.
    row = jnp.minimum(part["row_of"], shape.rows - 1)
    behind = jnp.arange(shape.tokens, dtype=jnp.int32) - part["cu_q_lens"][row]
    valid = (part["row_of"] < shape.rows) & (behind <= num_drafts[row])
    slot = jnp.where(valid, slots[row], nowhere)
    position = jnp.where(valid, lengths[row] - 1 + behind, 0)
    pages_of = lambda *at: page_table.at[at].get(mode="fill", fill_value=0)
    count = jnp.full((), shape.tokens, jnp.int32)
    batch = RaggedBatch(
        pages_of(slot), position + 1, jnp.arange(shape.tokens + 1, dtype=jnp.int32),
        count, count, pages_of(slot, position // page_size), position % page_size,
    )  # fmt: skip
    ids = tokens.at[slot, position].get(mode="fill", fill_value=0)
    hidden, kv_caches = forward(config, backend, params, state.kv_caches, ids, position, batch)

    with jax.named_scope("verify"):
        tables = replace(state.tables, tokens=tokens)
        each = {
            "constants": part["constants"][:, row],
            "row_flags": jnp.where(slot < nowhere, part["row_flags"][row], 0),
            "sample_positions": position + 1,
            "slots": slot,
        }
        rows = logits(config, params, hidden)
        out = sample(rows, sampling_input(each), tables, num_logprobs=MAX_LOGPROBS, plain=shape.plain)
        ahead = jnp.arange(shape.drafts + 1, dtype=jnp.int32)[None]
        columns = jnp.where(ahead <= num_drafts[:, None], part["cu_q_lens"][:-1, None] + ahead, shape.tokens)
        sampled = out.token.at[columns].get(mode="fill", fill_value=-1)
        if drafter.config.benchmark_forced_acceptance is not None:
            sampled = forced(sampled, drafts, lengths, drafter.config.benchmark_forced_acceptance)
            out = replace(out, token=out.token.at[columns].set(sampled, mode="drop"))
        kept = num_kept(sampled, drafts, num_drafts)
        counts = jnp.where(slots < nowhere, kept + 1, 0)
        tokens = _write(tokens, slots, lengths, sampled, counts)
        lengths = state.lengths.at[slots].set(lengths + counts, mode="drop")
    tables = replace(tables, tokens=tokens)
    state = replace(state, kv_caches=kv_caches, page_table=page_table, tables=tables, lengths=lengths)
    return state, StepOutput(out, None, Runs(counts, num_drafts))


def _drafts(
    drafter: Drafter, part: dict[str, Array], state: DeviceState, slots: Array, lengths: Array
) -> tuple[Array, Array]:
    """-> drafts i32[R, K], and how many of each row's are valid i32[R]."""
    config = drafter.config
    if config.method == "ngram":
        known = state.tables.tokens.at[slots].get(mode="clip")
        shortest, longest = config.prompt_lookup_min, config.prompt_lookup_max
        return ngram.propose(known, lengths, part["given"].shape[1], shortest, longest)
    return part["given"], part["num_given"]


def _write(table: Array, slots: Array, first: Array, tokens: Array, counts: Array) -> Array:
    """-> the table [slots, L] with the first counts[r] of tokens[r] at columns from first[r] on of row slots[r]."""
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    rows = jnp.where(at < counts[:, None], slots[:, None], table.shape[0])
    return table.at[rows, first[:, None] + at].set(jnp.maximum(tokens, 0), mode="drop")
