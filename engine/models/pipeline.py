"""One ragged batch as micro-batches: how many are worth it, and which rows and tokens each of them has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kernels.attention import RaggedBatch

MOST = 8  # micro-batches of a step: with 4 stages, 27 % of the time is idle
MORE_TOKENS = 8  # what a micro-batch with as many rows as tokens is padded by, unless all of its rows are decodes


def micro_batches(tokens: int, least: int, most: int = MOST) -> int:
    """-> how many micro-batches a step of `tokens` has: as many as divide it, with at least `least` tokens each."""
    return max(n for n in range(1, most + 1) if tokens % n == 0 and (n == 1 or tokens // n >= least))


def cut(batch: RaggedBatch, count: int) -> tuple[RaggedBatch, int]:
    """-> `count` micro-batches, as a RaggedBatch whose arrays have them as first axis, and the tokens of each.

    A row that reaches over a border is a row of both; the first part ends where its tokens do. Micro-batches are
    computed in their order at every stage, so that the second finds the first's keys in the cache.
    """
    all_rows, all_tokens = batch.kv_lens.shape[0], batch.write_page.shape[0]
    tokens = all_tokens // count
    rows = min(all_rows, tokens)
    padding = MORE_TOKENS if all_tokens > all_rows and tokens <= rows else 0

    def one(m: Array) -> RaggedBatch:
        begin = m * tokens
        first = jnp.sum(batch.cu_q_lens[1:] <= begin, dtype=jnp.int32)
        at = first + jnp.arange(rows + 1)
        starts = jnp.clip(jnp.take(batch.cu_q_lens, at, mode="clip") - begin, 0, tokens)
        here = starts[1:] > starts[:-1]
        row = at[:-1]
        behind = jnp.take(batch.cu_q_lens, row + 1, mode="clip") - begin - tokens
        lens = jnp.take(batch.kv_lens, row, mode="clip") - jnp.maximum(behind, 0)
        num_rows = jnp.sum(here, dtype=jnp.int32)
        own = lambda x: jnp.pad(jax.lax.dynamic_slice_in_dim(x, begin, tokens), (0, padding))
        return RaggedBatch(
            page_table=jnp.where(here[:, None], jnp.take(batch.page_table, row, axis=0, mode="clip"), 0),
            kv_lens=jnp.where(here, lens, 0),
            cu_q_lens=starts,
            num_rows=num_rows,
            num_decodes=jnp.clip(batch.num_decodes - first, 0, num_rows),
            write_page=own(batch.write_page),
            write_offset=own(batch.write_offset),
        )

    return jax.vmap(one)(jnp.arange(count)), tokens + padding


def cut_tokens(x: Array, count: int, tokens: int) -> Array:
    """x [T, ...] -> [count, tokens, ...], each micro-batch's own; what is more than its share is zero."""
    x = x.reshape(count, -1, *x.shape[1:])
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def nothing(batch: RaggedBatch, is_real: Array) -> RaggedBatch:
    """-> the batch, or, where it is not real, one without rows, that writes to page 0."""
    return jax.tree.map(lambda x: jnp.where(is_real, x, jnp.zeros_like(x)), batch)
