"""THE jitted function: one ragged batch through the model, its attention and the sampler, with all state donated."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from engine.models.config import ModelConfig
from engine.models.params import Params
from engine.models.transformer import forward_with_taps, logits
from engine.request import MAX_LOGPROBS
from engine.sampler import SampleOutput, SamplingInput, SlotTables, prompt_logprobs, sample
from engine.speculation import heads
from engine.speculation.drafter import Drafter
from engine.speculation.lengths import follow
from engine.speculation.verify import Runs
from engine.step_input import FLOAT_FIELDS, SLOT_FIELDS, StepShape, unpack
from kernels.attention import Backend, RaggedBatch
from kernels.cuda.all_reduce import Link
from sharding.axes import ALONE, Axes


@struct.dataclass
class DeviceState:
    """What lives on the device between steps; donated through every one of them."""

    kv_caches: list[Any]  # one for each layer, in the attention backend's layout
    page_table: Array  # [slots, pages] i32: the pages of the slot's request, in order
    tables: SlotTables  # by slot: the tokens so far, and rare sampling wishes
    lengths: Array | None = None  # [slots] i32: tokens so far, where the engine speculates
    draft_caches: list[Any] = field(default_factory=list)  # as kv_caches, of the layers that draft
    head_outputs: Array | None = None  # [slots, D], of a head that drafts: its output at the token before the last
    link: Link | None = None  # through which devices that share layers add up what is small, if they have one


@struct.dataclass
class PromptLogprobs:
    """For each of the T tokens: how likely the prompt's next token was, and the most likely ones. float32, int32."""

    logprob: Array  # [T]
    rank: Array  # [T]
    top_ids: Array  # [T, MAX_LOGPROBS]
    top_logprobs: Array  # [T, MAX_LOGPROBS]


@struct.dataclass
class StepOutput:
    """What the host may read of a step. Rows are the plan's, then padding."""

    sampled: SampleOutput  # S rows
    prompt: PromptLogprobs | None  # zeros unless a row asked; None where the shape has none
    runs: Runs | None = None  # which of the sampled tokens, in a step that verified drafts


def step(
    config: ModelConfig,
    backend: Backend,
    page_size: int,
    shape: StepShape,
    params: Params,
    state: DeviceState,
    flat: Array,
    axes: Axes = ALONE,
    drafter: Drafter | None = None,
) -> tuple[DeviceState, StepOutput]:
    """Compute one step. `flat` is BatchBuilder.build's int32 array; what comes before `params` is static.

    So are `axes` and `drafter`, whose head, if it has one, looks at every token.

    On a mesh it runs inside `jax.shard_map`: `params` and `kv_caches` are this device's, all else is everybody's.
    """
    part = unpack(flat, shape)
    # Padding has slots out of range: it changes nothing, reads page 0 and writes there.
    page_table = grow_table(state.page_table, part)
    if state.lengths is not None:
        part = follow(part, state.lengths)
    batch = ragged_batch(part, page_table, page_size)
    tables = state.tables
    sampled_before = tables.tokens[jnp.maximum(-1 - part["tokens"], 0), part["positions"]]
    tokens = jnp.where(part["tokens"] < 0, sampled_before, part["tokens"])
    taps, positions = drafter.taps if drafter else (), part["positions"]
    hidden, kv_caches, tapped = forward_with_taps(
        config, backend, params, state.kv_caches, tokens, positions, batch, taps, axes
    )

    with jax.named_scope("sample"):
        rows = axes.stage.last(hidden[part["sample_at"]])
        out = sample_rows(config, params, rows, sampling_input(part), tables, shape.plain, axes)
        active = part["row_flags"] != 0
        slots = jnp.where(active, part["slots"], tables.tokens.shape[0])
        history = tables.tokens.at[slots, part["sample_positions"]].set(jnp.maximum(out.token, 0), mode="drop")

        lengths = state.lengths
        if lengths is not None:
            lengths = lengths.at[slots].set(part["sample_positions"] + 1, mode="drop")

    if drafter and drafter.has_head:
        assert state.head_outputs is not None
        outputs, draft_caches = heads.observe(
            drafter, config, backend, params, state.draft_caches, state.head_outputs, hidden, tapped, history,
            part["token_slots"], positions, batch, slots, part["sample_at"], axes,
        )  # fmt: skip
        state = replace(state, draft_caches=draft_caches, head_outputs=outputs)
    state = replace(
        state, kv_caches=kv_caches, page_table=page_table, tables=replace(tables, tokens=history), lengths=lengths
    )
    if not shape.has_prompt_logprobs:
        return state, StepOutput(out, None)

    def to_logits(rows: Array) -> Array:
        return axes.whole.gather(logits(config, params, rows), axis=1)[:, : config.vocab_size]

    def prompt(hidden: Array) -> PromptLogprobs:
        hidden = axes.stage.last(hidden)
        return PromptLogprobs(*prompt_logprobs(to_logits, hidden, part["next_tokens"], num_logprobs=MAX_LOGPROBS))

    def nothing(hidden: Array) -> PromptLogprobs:
        T, K = shape.tokens, MAX_LOGPROBS
        return PromptLogprobs(jnp.zeros(T), jnp.zeros(T, jnp.int32), jnp.zeros((T, K), jnp.int32), jnp.zeros((T, K)))

    with jax.named_scope("prompt_logprobs"):
        asked = jax.lax.cond(part["wants_prompt_logprobs"] != 0, prompt, nothing, hidden)
    return state, StepOutput(out, asked)


def sample_rows(
    config: ModelConfig, params: Params, hidden: Array, inp: SamplingInput, tables: SlotTables, plain: bool, axes: Axes
) -> SampleOutput:
    """hidden [S, D] -> a token for each row. On a mesh each device makes logits of its part of the vocabulary for all
    rows, and samples its part of the rows: what they exchange is that part of the logits, and the tokens."""
    count = hidden.shape[0]
    pad = lambda x: jnp.pad(x, ((0, -count % axes.whole.size), *((0, 0),) * (x.ndim - 1)))
    rows = axes.whole.exchange(logits(config, params, pad(hidden)))[:, : config.vocab_size]
    own = jax.tree.map(lambda x: axes.whole.pick(pad(x)), inp)
    out = sample(rows, own, tables, num_logprobs=MAX_LOGPROBS, plain=plain)
    return jax.tree.map(lambda x: axes.whole.gather(x)[:count], out)


def ragged_batch(part: dict[str, Array], page_table: Array, page_size: int) -> RaggedBatch:
    """-> the batch that the parts of a flat input tell of."""
    pages_of = lambda *at: page_table.at[at].get(mode="fill", fill_value=0)
    return RaggedBatch(
        pages_of(part["slots"]), part["kv_lens"], part["cu_q_lens"], part["num_rows"], part["num_decodes"],
        pages_of(part["token_slots"], part["positions"] // page_size), part["positions"] % page_size,
    )  # fmt: skip


def grow_table(page_table: Array, part: dict[str, Array]) -> Array:
    """-> page_table [slots, pages] with the page that each row has got."""
    return page_table.at[part["slots"], part["new_page_at"]].set(part["new_page"], mode="drop")


def write_page_table(page_table: Array, slots: Array, rows: Array) -> Array:
    """-> page_table [slots, pages] with rows [R, pages] at `slots` [R]; one that is out of range is dropped."""
    return page_table.at[slots].set(rows, mode="drop")


def write_slot(tables: Any, slot: Array, row: Any) -> Any:
    """-> a tree of tables [slots, ...] with one slot's part replaced, such as SlotTables by slots.slot_row's."""
    return jax.tree.map(lambda table, value: table.at[slot].set(value), tables, row)


def sampling_input(part: dict[str, Array]) -> SamplingInput:
    """-> how rows sample, from the parts of a flat input that say so."""
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
    constants = zip(SLOT_FIELDS, part["constants"], strict=True)
    row = {name: as_float(values) if name in FLOAT_FIELDS else values for name, values in constants}
    seed = jnp.stack([row.pop("seed_high"), row.pop("seed_low")], axis=-1)
    row["flags"] = part["row_flags"]
    return SamplingInput(
        seed=jax.lax.bitcast_convert_type(seed, jnp.uint32),
        position=part["sample_positions"],
        slot=part["slots"],
        **row,
    )
