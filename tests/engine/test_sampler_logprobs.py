"""Logprobs of sampled tokens and of prompts, against their definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import sampler
from tests.engine.sampler_batches import NUM_LOGPROBS, ROWS, VOCAB, make_batch, make_request, random_batch, sample


def test_logprobs_are_the_raw_softmax_whatever_the_row_does_to_its_logits():
    logits, _, inp, tables = random_batch(8)
    out = sample(logits, inp, tables)
    raw = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    chosen = np.take_along_axis(raw, np.asarray(out.token)[:, None], axis=1)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :NUM_LOGPROBS]
    np.testing.assert_allclose(out.logprob, chosen[:, 0], atol=1e-5)
    np.testing.assert_array_equal(out.rank, 1 + (raw > chosen).sum(axis=1))
    np.testing.assert_array_equal(out.top_ids, order)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(raw, order, axis=1), atol=1e-5)


def test_a_greedy_tokens_logprob_is_the_maximum_to_the_bit():
    logits = (np.random.default_rng(0).normal(size=(ROWS, VOCAB)) * 4).astype(np.float32)
    requests = [make_request([1], 1, temperature=0.0, logprobs=0) for _ in logits]
    out = sample(logits, *make_batch(requests))
    np.testing.assert_array_equal(out.logprob, out.top_logprobs[:, 0])
    assert np.all(out.rank == 1)


def test_logprobs_are_zero_when_no_active_row_wants_them():
    logits, _, inp, tables = random_batch(9)
    wants = np.array([sampler.WANTS_LOGPROBS] + [sampler.ACTIVE] * (ROWS - 1), np.int32)
    out = sample(logits, inp.replace(flags=jnp.asarray(wants)), tables)
    assert out.top_logprobs.shape == (ROWS, NUM_LOGPROBS)
    assert not any(np.any(x) for x in (out.logprob, out.rank, out.top_ids, out.top_logprobs))


def test_equal_logits_share_a_rank_and_the_first_wins_greedily():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [11, 50, 96]] = 2
    request = make_request([1], 1, temperature=0.0, logprobs=3)
    out = sample(logits, *make_batch([request]))
    assert (out.token[0], out.rank[0]) == (11, 1)
    assert out.top_ids[0].tolist() == [11, 50, 96, 0, 1]


@pytest.mark.parametrize("k", [1, 20])
def test_the_most_likely_tokens_are_those_of_a_sort_also_among_equals(k):
    logits = np.random.default_rng(k).normal(size=(5, 6000)).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2] = 0
    logits[3] = -np.inf
    logits[3, 77] = 1
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    token = jnp.zeros(5, jnp.int32)
    _, _, ids, logprobs = sampler.raw_logprobs(jnp.asarray(logits), token, k)
    np.testing.assert_array_equal(ids, order)
    wanted = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    np.testing.assert_allclose(logprobs[0], wanted[order[0]], atol=1e-5)


@pytest.mark.parametrize(("rows", "chunk"), [(1, 64), (5, 64), (64, 16), (75, 16)])
def test_prompt_logprobs_in_chunks_equal_those_of_all_rows_at_once(rows, chunk):
    rng = np.random.default_rng(rows)
    hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((rows, 8), (8, VOCAB)))
    following = rng.integers(0, VOCAB, rows).astype(np.int32)
    out = sampler.prompt_logprobs(
        lambda h: h @ head, jnp.asarray(hidden), jnp.asarray(following), num_logprobs=4, chunk=chunk
    )
    logprob, rank, top_ids, top = map(np.asarray, out)
    logits = (hidden @ head).astype(np.float64)
    raw = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen = np.take_along_axis(raw, following[:, None], axis=1)
    np.testing.assert_allclose(logprob, chosen[:, 0], atol=1e-4)
    np.testing.assert_array_equal(rank, 1 + (raw > chosen).sum(axis=1))
    np.testing.assert_array_equal(top_ids, np.argsort(-raw, axis=1)[:, :4])
    np.testing.assert_allclose(top, -np.sort(-raw, axis=1)[:, :4], atol=1e-4)


def test_prompt_logprobs_never_hold_the_logits_of_all_rows():
    rows, vocab_size, chunk = 1024, 4096, 32
    head = jnp.zeros((8, vocab_size))
    run = lambda h, t: sampler.prompt_logprobs(lambda h: h @ head, h, t, num_logprobs=4, chunk=chunk)
    compiled = jax.jit(run).lower(jnp.zeros((rows, 8)), jnp.zeros(rows, jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * chunk * vocab_size * 4
