"""Heads that draft from what the verifying model computes anyway: EAGLE-3, and multi-token prediction (MTP).

Both are one decoder layer. At a sequence's position p it reads features of the model's own pass over p, and the token
at p + 1, and its output tells the token at p + 2; for the drafts behind that, its own output takes the features' place.
EAGLE-3 (Li et al. 2025, section 3): features are three layers' hidden states, fused by one product. MTP (DeepSeek-V3,
arXiv 2412.19437, section 2.2): they are the hidden states behind the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.models.config import ModelConfig
from engine.models.layers import project, rms_norm
from engine.models.params import Params
from engine.models.rope import rope_tables
from engine.models.transformer import attention_spec, decoder_layer, embed, gated_layer, logits
from engine.sampler import SlotTables
from engine.speculation.drafter import Drafter
from engine.speculation.rows import Rows
from kernels.attention import Backend, RaggedBatch
from sharding.axes import ALONE, Axes

Choose = Callable[[Array, Array, SlotTables], Array]  # logits [R, V], positions [R], tables -> tokens i32[R]


def observe(
    drafter: Drafter,
    target: ModelConfig,
    backend: Backend,
    params: Params,
    caches: list[Any],
    outputs: Array,
    hidden: Array,
    taps: Sequence[Array],
    tokens: Array,
    token_slots: Array,
    positions: Array,
    batch: RaggedBatch,
    slots: Array,
    last: Array,
    axes: Axes,
) -> tuple[Array, list[Any]]:
    """Show the head T tokens that the model has just computed. -> what it makes of each slot's last, and new caches.

    hidden [T, D] behind the final norm, which the last stage has, and taps [T, D] each; tokens i32[slots, L], with
    those that follow the T tokens i32[T] of `token_slots` at `positions`; outputs [slots, D], of which rows i32[R] of
    `slots` are replaced by the head's at tokens i32[R] `last`. Slots out of range change nothing.
    """
    with jax.named_scope("draft"):
        seen = (
            project(jnp.concatenate(taps, axis=-1), params["draft"]["fc"]) if drafter.taps else axes.stage.last(hidden)
        )
        following = tokens.at[token_slots, positions + 1].get(mode="fill", fill_value=0)
        out, caches = advance(drafter, target, backend, params, caches, seen, following, positions, batch, axes)
        return outputs.at[slots].set(out[last], mode="drop"), caches


def advance(
    drafter: Drafter,
    target: ModelConfig,
    backend: Backend,
    params: Params,
    caches: list[Any],
    seen: Array,
    next_tokens: Array,
    positions: Array,
    batch: RaggedBatch,
    axes: Axes,
) -> tuple[Array, list[Any]]:
    """seen [T, D] at positions [T], and the tokens behind them i32[T] -> the head's output [T, D], new caches.

    Of a mesh every device computes the whole head; the model's embedding is what they share.
    """
    config, p = drafter.model, params["draft"]
    assert config is not None
    token = embed(params["embed"], next_tokens, axes)
    token = token * jnp.asarray(target.embedding_scale, token.dtype)
    weights, spec, layer = p["layers"][0], attention_spec(config, 0), config.layers[0]
    norm = lambda x, weight: rms_norm(x, weight, config.norm_eps)
    rope = None if layer.rope is None else rope_tables(layer.rope, positions, config.max_model_len)
    if drafter.config.method == "mtp":
        x = project(jnp.concatenate([norm(token, p["enorm"]), norm(seen, p["hnorm"])], axis=-1), p["eh_proj"])
        kinds = ((layer, spec),)
        both = x, norm(x, weights["attn_norm"])
        (out, _), cache = decoder_layer(
            config, kinds, backend, ALONE, weights, None, caches[0], both, (rope,), batch, None
        )
    else:
        normed = norm(seen, p["hidden_norm"])
        x = jnp.concatenate([norm(token, weights["attn_norm"]), normed], axis=-1)
        before = normed if drafter.norm_before_residual else seen
        out, cache = gated_layer(config, layer, backend, spec, weights, caches[0], x, before, batch, rope)
    return out, [cache]


def propose(
    drafter: Drafter,
    target: ModelConfig,
    backend: Backend,
    page_size: int,
    params: Params,
    caches: list[Any],
    rows: Rows,
    last: Array,
    count: int,
    tables: SlotTables,
    choose: Choose,
    axes: Axes,
) -> tuple[SlotTables, list[Any]]:
    """-> the tables with `count` tokens drafted behind each row's end, and the new caches.

    last [R, D]: the head's output that tells the token behind each row's end.
    """
    row = jnp.arange(rows.slots.shape[0], dtype=jnp.int32)
    for step in range(count):
        token = choose(_logits(drafter, target, params, last), rows.lengths + step, tables)
        tables = replace(tables, tokens=rows.write(tables.tokens, step, token))
        if step + 1 < count:
            _, positions, batch = rows.spread(row, jnp.full_like(row, step), tables.tokens, page_size)
            token = jnp.maximum(token, 0)
            last, caches = advance(drafter, target, backend, params, caches, last, token, positions, batch, axes)
    return tables, caches


def _logits(drafter: Drafter, target: ModelConfig, params: Params, out: Array) -> Array:
    """out [R, D] -> [R, V] float32, over the model's vocabulary; -inf where a head has a smaller one."""
    config, p = drafter.model, params["draft"]
    assert config is not None
    found = logits(config, p, rms_norm(out, p["final_norm"], config.norm_eps))
    if "draft_ids" not in p:
        return found
    return jnp.full((out.shape[0], target.vocab_size), -jnp.inf).at[:, p["draft_ids"]].set(found)
