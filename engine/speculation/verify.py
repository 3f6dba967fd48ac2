"""Which drafts a sequence keeps, and what it gets behind them.

Every position's token is sampled from the model as it would be without drafts: with all of the request's parameters,
and noise that is a function of (seed, position, token). A draft is kept while it is that very token. This is the
rejection rule of Leviathan et al. (2023) and Chen et al. (2023), section 2.3 and algorithm 2, with one source of
randomness for its three draws. Let the target be p and the draft d be certain (q(d) = 1): d is kept with probability
p(d), and given that it is not, the token has the distribution p(x) / (1 - p(d)) over x != d, which is their residual
max(p - q, 0), normalised; behind the last draft the token is drawn from p, their bonus token. Where drafts are sampled
from a q of their own, the drafter uses the same noise (`sampler.sample`), which couples the two draws (Daliri, Musco &
Suresh 2024): d is kept with probability at least (1 - D) / (1 + D), for D the total variation distance of p and q. What
this buys is that a sequence never depends on what was drafted, or whether anything was.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array


@struct.dataclass
class Runs:
    """What each of R rows got in one step. int32."""

    counts: Array  # [R] tokens, the last of them no draft; 0 for rows that have ended, and padding
    drafted: Array  # [R] drafts that were verified


def num_kept(sampled: Array, drafts: Array, num_drafts: Array) -> Array:
    """sampled i32[R, 1 + K], drafts i32[R, K] of which num_drafts i32[R] are valid -> i32[R]: drafts before the first
    that differs from the token sampled in its place."""
    valid = jnp.arange(drafts.shape[1], dtype=jnp.int32)[None] < num_drafts[:, None]
    right = valid & (sampled[:, :-1] == drafts)
    return jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def forced(sampled: Array, drafts: Array, lengths: Array, share: float) -> Array:
    """-> sampled i32[R, 1 + K] with drafts put in, so that of all drafts this share is kept. For benchmarks alone.

    Each draft is right with the probability c that makes c + c^2 + ... + c^K = share K; chance is a hash of the length.
    """
    count = drafts.shape[1]
    roots = np.linspace(0, 1, 100_001)
    chance = roots[np.argmin(np.abs(sum(roots**i for i in range(1, count + 1)) - share * count))]
    draw = lambda n: jax.random.uniform(jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), n), (count,))
    right = jax.vmap(draw)(lengths) < chance
    own = sampled[:, :-1]
    other = jnp.where(own != drafts, own, jnp.where(drafts == 0, 1, 0).astype(drafts.dtype))
    return sampled.at[:, :-1].set(jnp.where(right, drafts, other))
