"""The kernel that draws from cut distributions, in interpret mode, against a sort of each row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cuda.draw import keep_or_redraw
from tests.kernels.cuda.test_lowering import H200

VOCAB = 5000  # two turns of the kernel and a part of a third
LIMITS = [  # top_k, top_p, min_p
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (2000, 1.0, 0.0), (VOCAB, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.05, 0.0),
    (0, 1e-30, 0.0), (0, 1.0, 0.3), (0, 1.0, 1.0), (40, 0.8, 0.0), (300, 0.5, 0.01), (3, 0.999, 0.05), (0, 0.7, 0.02),
]  # fmt: skip


def noise(first, second, token):
    """Not random, but as wild as noise: up to 8, from the bits of a product."""
    bits = (token * jnp.uint32(2654435761) + first) ^ (second * token)
    return (bits >> jnp.uint32(8)).astype(jnp.float32) * 2.0**-21


def kept_tokens(x: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """x [V] float32, its largest 0 -> bool [V]."""
    odds = np.exp(x.astype(np.float64))
    kept = (odds >= min_p) | (x == 0)
    if top_k > 0:
        kept &= x >= np.sort(x)[-top_k]
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        order = order[kept[order]]
        needed = np.searchsorted(np.cumsum(odds[order]), top_p * odds[kept].sum()) + 1
        kept &= x >= x[order[min(needed, len(order)) - 1]]
    return kept


@pytest.mark.parametrize("spread", [0.5, 2.0, 12.0], ids=["flat", "wide", "peaked"])
def test_a_token_is_the_best_of_those_that_the_limits_keep(spread: float):
    random = np.random.default_rng(int(spread * 10))
    rows = len(LIMITS)
    logits = (spread * random.standard_normal((rows, VOCAB))).astype(np.float32)
    logits[:, ::7] = np.round(logits[:, ::7])  # ties
    logits[:, 5:50] = -np.inf  # banned
    temperature = random.uniform(0.3, 2, rows).astype(np.float32)
    keys = random.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    top_k, top_p, min_p = (np.array(column) for column in zip(*LIMITS, strict=True))
    best = logits.max(1)
    x = np.asarray((jnp.asarray(logits) - best[:, None]) / temperature[:, None])
    scores = x + np.asarray(
        noise(*(jnp.asarray(keys[:, i : i + 1]) for i in (0, 1)), jnp.arange(VOCAB, dtype=jnp.uint32)[None])
    )
    got = keep_or_redraw(
        *map(jnp.asarray, (logits, scores.argmax(1).astype(np.int32), best, temperature)),
        jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32), jnp.asarray(min_p, jnp.float32),
        jnp.asarray(keys), jnp.ones(rows, bool),
        noise=noise, interpret=True,
    )  # fmt: skip
    wanted = [np.where(kept_tokens(x[row], *LIMITS[row]), scores[row], -np.inf).argmax() for row in range(rows)]
    np.testing.assert_array_equal(got, wanted)
    assert len(set(wanted) - set(scores.argmax(1))) > 2, "some must have been drawn anew"


def test_rows_that_are_not_cut_or_have_no_best_logit_keep_their_token_whatever_they_hold():
    logits = jnp.full((2, VOCAB), jnp.nan)
    ones = jnp.ones(2)
    token = jnp.array([3, 4], jnp.int32)
    got = keep_or_redraw(
        logits, token, ones * jnp.nan, ones, jnp.array([5, 5], jnp.int32), ones * 0.5, ones,
        jnp.ones((2, 2), jnp.uint32), jnp.array([False, True]), noise=noise, interpret=True,
    )  # fmt: skip
    np.testing.assert_array_equal(got, token)


@pytest.mark.skipif(H200 is None, reason="this JAX cannot lower for a GPU that is not there")
def test_it_lowers_for_a_gpu():
    given = jax.ShapeDtypeStruct
    floats, ints = given((8,), jnp.float32), given((8,), jnp.int32)
    arguments = (given((8, 151936), jnp.float32), ints, floats, floats, ints, floats, floats, given((8, 2), jnp.uint32))
    with jax.sharding.use_abstract_mesh(H200):
        draw = jax.jit(lambda *given: keep_or_redraw(*given, noise=noise))
        lowered = draw.trace(*arguments, given((8,), bool)).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()
