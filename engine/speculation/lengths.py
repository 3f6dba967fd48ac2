"""Where sequences end, as the device knows it: with drafts in flight, the host knows the least that it can be."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def length_of(lengths: Array, slots: Array) -> Array:
    """-> i32[S]: tokens that each slot's sequence has, 1 for a slot out of range."""
    return lengths.at[slots].get(mode="fill", fill_value=1)


def follow(part: dict[str, Array], lengths: Array) -> dict[str, Array]:
    """-> the parts of a flat input (batch.unpack) with each row where its sequence really ends.

    Rows whose token the host does not know (below 0) are decodes, so that row i has token i. One that has come to its
    limit becomes padding: its request has ended, and the host will see.
    """
    rows, padding = part["slots"].shape[0], lengths.shape[0]
    unknown = part["tokens"][:rows] < 0
    length = length_of(lengths, part["slots"])
    ended = unknown & (length > part["limits"])
    length = jnp.where(ended, 0, length)
    take = lambda name, value: jnp.where(unknown, value, part[name])
    first = lambda name, value: part[name].at[:rows].set(jnp.where(unknown, value, part[name][:rows]))
    return part | {
        "kv_lens": take("kv_lens", length),
        "sample_positions": take("sample_positions", length),
        "slots": jnp.where(ended, padding, part["slots"]),
        "positions": first("positions", jnp.maximum(length - 1, 0)),
        "token_slots": part["token_slots"].at[:rows].set(jnp.where(ended, padding, part["token_slots"][:rows])),
    }
