"""The sampler's draws against the distribution that they claim, and the noise that they are made of."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from engine import sampler
from engine.request import Request, SamplingParams
from tests.engine.sampler_batches import make_batch, make_request, oracle_filtered

DRAWS = 200_000
SMALL = (np.random.default_rng(3).normal(size=50) * 1.5).astype(np.float32)


def test_seed_position_and_token_each_change_the_noise():
    base = np.array([[1, 2]], np.uint32), np.array([5], np.int32)
    noise = sampler.gumbel(*map(jnp.asarray, base), 1000)
    others = ([[2, 2]], [5]), ([[1, 3]], [5]), ([[1, 2]], [6]), ([[2, 1]], [5])
    for seed, position in others:
        other = sampler.gumbel(jnp.array(seed, jnp.uint32), jnp.array(position, jnp.int32), 1000)
        assert np.mean(noise == other) < 0.01
    assert len(np.unique(noise)) > 990
    np.testing.assert_array_equal(noise[:, :100], sampler.gumbel(*map(jnp.asarray, base), 100))


def draw(request: Request, logits: np.ndarray, count: int, *, vary: str = "position") -> np.ndarray:
    """-> tokens of `count` draws from one row, each with its own position or seed."""
    rows = 2000 if len(logits) < 1000 else 40  # a batch that stays in the processor's cache
    inp, tables = make_batch([request], vocab_size=len(logits), max_len=8)

    def some(start: jax.Array) -> jax.Array:
        many = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), inp)
        numbers = start + jnp.arange(rows)
        if vary == "position":
            many = many.replace(position=numbers)
        else:
            many = many.replace(seed=jnp.stack([jnp.zeros(rows, jnp.uint32), numbers.astype(jnp.uint32)], axis=1))
        copies = jnp.broadcast_to(logits[None], (rows, len(logits)))
        return sampler.sample(copies, many, tables, num_logprobs=1).token

    tokens = jax.jit(lambda starts: jax.lax.map(some, starts))(jnp.arange(0, count, rows))
    return np.asarray(tokens).ravel()


def p_value(tokens: np.ndarray, filtered: np.ndarray) -> float:
    """-> how likely such counts are under the softmax of `filtered`; tokens expected fewer than 5 times share a bin."""
    odds = np.exp(filtered.astype(np.float64))
    expected = odds / odds.sum() * len(tokens)
    counts = np.bincount(tokens, minlength=len(odds))
    if counts[expected == 0].any():
        return 0.0
    large = expected >= 5
    bins = lambda x: np.append(x[large], x[~large].sum())
    if expected[~large].sum() < 5:
        bins = lambda x: np.append(x[large][:-1], x[large][-1] + x[~large].sum())
    return float(stats.chisquare(bins(counts), bins(expected)).pvalue)


@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.6}, {"top_p": 0.8}, {"min_p": 0.02, "temperature": 2.0}, {"top_p": 0.95, "top_k": 12}],
    ids=str,
)
def test_draws_follow_the_distribution(params, vary):
    request = make_request([1], 1, seed=1234, **params)
    tokens = draw(request, SMALL, DRAWS, vary=vary)
    assert p_value(tokens, oracle_filtered(SMALL.astype(np.float64), request.params)) > 0.001
    for name in params:  # and the test would see it if one were ignored
        ignored = dataclasses.replace(request.params, **{name: getattr(SamplingParams(), name)})
        assert p_value(tokens, oracle_filtered(SMALL.astype(np.float64), ignored)) < 1e-9, name


def test_draws_from_a_large_vocabulary_follow_the_distribution():
    logits = -np.log(np.arange(1, 49153, dtype=np.float32))
    tokens = draw(make_request([1], 1, seed=5), logits, 12_000)
    assert p_value(tokens, logits) > 0.001
    # The rare tokens, too few to count one by one, in 64 ranges of ids.
    edges = np.linspace(5000, len(logits), 65).astype(int)
    weights = np.add.reduceat(np.exp(logits.astype(np.float64)), edges[:-1])
    counts = np.histogram(tokens[tokens >= 5000], edges)[0]
    assert stats.chisquare(counts, weights / weights.sum() * counts.sum()).pvalue > 0.001


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_adjacent_draws_are_independent(vary):
    tokens = draw(make_request([1], 1, seed=99), np.zeros(16, np.float32), DRAWS, vary=vary)
    for lag in (1, 2, 16):
        pairs = np.bincount(tokens[:-lag] * 16 + tokens[lag:], minlength=256)
        assert stats.chisquare(pairs).pvalue > 0.001, lag
    triples = np.bincount(tokens[:-2] * 256 + tokens[1:-1] * 16 + tokens[2:], minlength=4096)
    assert stats.chisquare(triples).pvalue > 0.001


def test_noise_is_standard_gumbel_without_correlation_between_neighbours():
    rows, vocab_size = 32, 8192
    seeds = jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], axis=1)
    same_seed = jnp.tile(seeds[7:8], (rows, 1))
    by_seed = np.asarray(sampler.gumbel(seeds, jnp.full(rows, 3, jnp.int32), vocab_size), np.float64)
    by_position = np.asarray(sampler.gumbel(same_seed, jnp.arange(rows, dtype=jnp.int32), vocab_size), np.float64)
    for noise in (by_seed, by_position):
        assert stats.kstest(noise.ravel()[::4], stats.gumbel_r.cdf).pvalue > 0.001
        noise = (noise - np.euler_gamma) / (np.pi / np.sqrt(6))
        shifted = [(noise[1:], noise[:-1])] + [(noise[:, lag:], noise[:, :-lag]) for lag in (1, 2, 8, 64, 4096)]
        for a, b in shifted:
            assert abs((a * b).sum()) < 4 * np.sqrt(a.size)
    assert np.isfinite(by_seed).all()
