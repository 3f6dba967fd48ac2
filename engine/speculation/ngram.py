"""Prompt lookup on the device: what followed the last occurrence of a sequence's end is drafted to follow it again.

Saxena, "Prompt Lookup Decoding" (2023). All slots at once, from the table of their tokens: the host is not asked.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def propose(tokens: Array, lengths: Array, count: int, shortest: int, longest: int) -> tuple[Array, Array]:
    """tokens i32[R, L], of which row r has lengths[r] -> drafts i32[R, count], and how many are valid i32[R].

    Of all places before the end, the one wins that has most tokens before it in common with the end, up to `longest`;
    of equals the last. Fewer than `shortest` in common are no match: no draft is valid, else all are. A match so near
    the end that its continuation is the end itself goes round, as in a text that repeats.
    """
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    common = jnp.zeros(tokens.shape, jnp.int32)
    alike = (at >= shortest) & (at < lengths[:, None])  # places that something may follow
    for back in range(1, longest + 1):
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - back, 0)[:, None], axis=1)
        alike = alike & (jnp.roll(tokens, back, axis=1) == last) & (at >= back)
        common = common + alike.astype(jnp.int32)
    length = tokens.shape[1]
    score = jnp.where(common >= shortest, common * length + at, 0)
    best = jnp.max(score, axis=1)
    found = best > 0
    period = jnp.maximum(lengths - best % length, 1)
    columns = (lengths - period)[:, None] + jnp.arange(count, dtype=jnp.int32)[None] % period[:, None]
    drafts = jnp.take_along_axis(tokens, jnp.clip(columns, 0, length - 1), axis=1)
    return drafts, jnp.where(found, count, 0).astype(jnp.int32)
