"""How the rows of a batch that are prompts are cut into blocks of queries, each the work of a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

if TYPE_CHECKING:
    from kernels.attention import RaggedBatch

ALIGNED = 8  # a copy to shared memory starts at a multiple of these rows


def query_blocks(batch: RaggedBatch, tokens: int, size: int) -> Array:
    """Cut the rows from num_decodes on into blocks of `size` queries, the last of a row first.

    -> [4, N] i32: a block's row, its first token, that token's position, and its number of queries: 0 where unused,
    as its position is then, so that the kernel's loops are empty.
    N is a bound for every batch of `tokens` tokens. Blocks of more context come first within a row, since they take
    longest.
    """
    rows = batch.kv_lens.shape[0]
    number = pl.cdiv(tokens, size) + min(rows, tokens)
    lens = batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]
    lens = jnp.where(jnp.arange(rows) < batch.num_decodes, 0, lens)
    blocks = pl.cdiv(lens, size)
    ends = jnp.cumsum(blocks)
    index = jnp.arange(number)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="compare_all"), rows - 1)
    used = index < ends[-1]
    begin = jnp.where(used, ends[row] - 1 - index, 0) * size
    count = jnp.where(used, jnp.minimum(lens[row] - begin, size), 0)
    position = jnp.where(used, batch.kv_lens[row] - lens[row] + begin, 0)
    return jnp.stack([row, batch.cu_q_lens[row] + begin, position, count]).astype(jnp.int32)


def aligned_blocks(batch: RaggedBatch, tokens: int, size: int, near: int) -> Array:
    """Cut the rows from num_decodes on into blocks of `size` queries.

    -> [5, N] i32: a block's row; its first token, a multiple of ALIGNED; that token's position, which may be negative;
    its number of queries; and how many of them, the first, are not the row's. Unused blocks, at the end, have no
    queries. N is a bound for every batch of `tokens` tokens. Rows that have about `near` tokens of context together
    are near each other, for the cache's sake; among them the blocks that see most come first, for equal shares.
    """
    rows = batch.kv_lens.shape[0]
    number = pl.cdiv(tokens + (ALIGNED - 1) * min(rows, tokens), size) + min(rows, tokens)
    lens = batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]
    lens = jnp.where(jnp.arange(rows) < batch.num_decodes, 0, lens)
    before = jnp.where(lens > 0, batch.cu_q_lens[:-1] % ALIGNED, 0)
    ends = jnp.cumsum(pl.cdiv(lens + before, size))
    index = jnp.arange(number)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="compare_all"), rows - 1)
    begin = (ends[row] - 1 - index) * size - before[row]
    parts = [
        row,
        batch.cu_q_lens[row] + begin,
        batch.kv_lens[row] - lens[row] + begin,
        jnp.minimum(lens[row] - begin, size),
        jnp.maximum(-begin, 0),
    ]
    together = jnp.cumsum(jnp.where(lens > 0, batch.kv_lens, 0)) // near
    used = index < ends[-1]
    order = jnp.lexsort((-(parts[2] + parts[3]), jnp.where(used, together[row], jnp.iinfo(jnp.int32).max)))
    return jnp.where(used, jnp.stack(parts)[:, order], 0).astype(jnp.int32)
