"""Rows: where the sequences of a step with drafts end, and any tokens of theirs as a ragged batch."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from kernels.attention import RaggedBatch, Runs


@struct.dataclass
class Rows:
    """R sequences. Their tokens lie in the table of tokens [slots, L], drafts behind them."""

    slots: Array  # i32[R]; out of range for padding, and where the sequence has ended
    lengths: Array  # i32[R] tokens that there are
    limits: Array  # i32[R] positions below have a place in the pages
    page_table: Array  # i32[slots, pages]

    def spread(
        self, row: Array, behind: Array, table: Array, page_size: int, runs: tuple[Array, int] | None = None
    ) -> tuple[Array, Array, RaggedBatch]:
        """-> token ids and positions i32[T], and the batch in which each of them is a row of its own.

        row i32[T], behind i32[T]: which tokens, counted from the sequence's last. Those that have no place, or lie
        before its first, are padding of page 0. To attention all are decodes: a row reads what rows before it write.
        `runs`: the first token i32[R] of each sequence, where there are more, and how many it has at most.
        """
        nowhere = self.page_table.shape[0]
        position = self.lengths[row] - 1 + behind
        slot = jnp.where((position >= 0) & (position < self.limits[row]), self.slots[row], nowhere)
        position = jnp.where(slot < nowhere, position, 0)
        pages_of = lambda *at: self.page_table.at[at].get(mode="fill", fill_value=0)
        count = jnp.full((), row.shape[0], jnp.int32)
        batch = RaggedBatch(
            pages_of(self.slots[row]), position + 1, jnp.arange(row.shape[0] + 1, dtype=jnp.int32), count, count,
            pages_of(slot, position // page_size), position % page_size,
            None if runs is None else Runs(runs[0], row, runs[1]),
        )  # fmt: skip
        return table.at[slot, position].get(mode="fill", fill_value=0), position, batch

    def write(self, table: Array, behind: int, tokens: Array) -> Array:
        """-> the table with tokens i32[R] or i32[R, N] from so far behind each sequence's end on; below 0 as 0."""
        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        columns = self.lengths[:, None] + behind + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return table.at[self.slots[:, None], columns].set(jnp.maximum(tokens, 0), mode="drop")
