"""The sampler against a plain numpy oracle of each row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import sampler
from engine.request import Request
from engine.sampler import SampleOutput
from engine.slots import is_plain
from tests.engine.sampler_batches import (
    ROWS,
    VOCAB,
    edited_logits,
    filtered_logits,
    make_batch,
    make_request,
    oracle_edited,
    oracle_filtered,
    random_batch,
    sample,
)


@pytest.mark.parametrize("seed", range(12))
def test_each_row_of_a_mixed_batch_is_filtered_as_the_oracle_does(seed):
    logits, requests, inp, tables = random_batch(seed)
    edited, filtered = edited_logits(logits, inp, tables), filtered_logits(logits, inp, tables)
    for row, request in enumerate(requests):
        expected = oracle_edited(logits[row], request)
        np.testing.assert_allclose(edited[row], expected, rtol=1e-5, atol=1e-5, err_msg=str(request.params))
        expected = oracle_filtered(expected, request.params)
        np.testing.assert_allclose(filtered[row], expected, rtol=1e-5, atol=2e-5, err_msg=str(request.params))


def test_greedy_rows_are_the_exact_argmax_and_random_rows_that_of_filtered_logits_plus_noise():
    logits, requests, inp, tables = random_batch(7)
    edited = np.asarray(edited_logits(logits, inp, tables))
    noise = np.asarray(sampler.gumbel(inp.seed, inp.position, VOCAB))
    scores = np.asarray(filtered_logits(logits, inp, tables)) + noise
    greedy = np.array([request.params.temperature < 1e-5 for request in requests])
    assert 0 < greedy.sum() < ROWS
    expected = np.where(greedy, edited.argmax(axis=1), scores.argmax(axis=1))
    np.testing.assert_array_equal(sample(logits, inp, tables).token, expected)


# --- a row's token is its own affair


def one_by_one(logits, inp, tables) -> list[SampleOutput]:
    """-> each row sampled in a batch of its own."""
    return [
        sample(logits[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], inp), tables) for i in range(len(logits))
    ]


def test_a_row_gets_the_same_token_alone_and_anywhere_in_any_batch():
    logits, _, inp, tables = random_batch(10)
    token = np.asarray(sample(logits, inp, tables).token)
    alone = [out.token[0] for out in one_by_one(logits, inp, tables)]
    np.testing.assert_array_equal(token, alone)
    for rows in (np.random.default_rng(0).permutation(ROWS), np.arange(5, 7), np.repeat(13, ROWS)):
        out = sample(logits[rows], jax.tree.map(lambda x, rows=rows: x[rows], inp), tables)
        np.testing.assert_array_equal(out.token, token[rows])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 1, 15, 16, 64, 95, 96])
def test_a_row_that_is_not_a_number_fails_alone(bad, column):
    logits, _, inp, tables = random_batch(11)
    healthy = sample(logits, inp, tables)
    assert np.all(healthy.token >= 0)
    broken, rows = logits.copy(), [0, 4, ROWS - 1]
    columns = column if bad != -np.inf else slice(None)  # -inf is a fault only where nothing else is left
    for row in rows:
        broken[row, columns] = bad
    out = sample(broken, inp, tables)
    assert np.all(out.token[np.array(rows)] == -1)
    others = np.delete(np.arange(ROWS), rows)
    for field in dataclasses.fields(out):
        np.testing.assert_array_equal(getattr(out, field.name)[others], getattr(healthy, field.name)[others])


def test_a_ban_of_every_token_fails_the_row_instead_of_sampling_a_banned_one():
    requests = [
        make_request([0, 1], 1, temperature=t, allowed_token_ids=[7, 8], bad_words=[(1, 7), (8,)]) for t in (0.0, 1.0)
    ]
    out = sample(np.zeros((2, VOCAB), np.float32), *make_batch(requests))
    assert out.token.tolist() == [-1, -1]


def test_inactive_rows_yield_no_token_and_ask_for_nothing():
    logits, _, inp, tables = random_batch(12)
    inp = inp.replace(flags=inp.flags & ~sampler.ACTIVE, slot=jnp.full(ROWS, ROWS, jnp.int32))
    out = sample(logits, inp, tables)
    assert np.all(out.token == -1)
    np.testing.assert_array_equal(edited_logits(logits, inp, tables), logits)


# --- the parameters' meanings, at their edges


def allowed_next(request: Request, logits: np.ndarray | None = None) -> set[int]:
    """-> the tokens that the request's next position may sample."""
    if logits is None:
        logits = np.zeros(VOCAB, np.float32)
    filtered = filtered_logits(logits[None], *make_batch([request]))
    return set(np.flatnonzero(np.isfinite(filtered[0])).tolist())


def test_min_tokens_bans_eos_and_stop_tokens_until_so_many_were_sampled():
    wish = {"min_tokens": 3, "stop_token_ids": [9], "eos": (3, 5)}
    everything = set(range(VOCAB))
    for outputs, expected in ((0, everything - {3, 5, 9}), (2, everything - {3, 5, 9}), (3, everything)):
        assert allowed_next(make_request([3] * (4 + outputs), 4, **wish)) == expected
    assert allowed_next(make_request([3] * 4, 4, min_tokens=3)) == everything  # nothing would end it


def test_a_bad_word_bans_its_last_token_only_after_outputs_that_begin_it():
    everything = set(range(VOCAB))
    words = [(1, 2, 3), (4,), (2, 5), (7, 7, 9), tuple(range(10, 18))]
    for tokens, banned in (
        ([1, 2], {4, 3, 5}),
        ([2], {4, 5}),
        ([1, 2, 2], {4, 5}),
        ([2, 1], {4}),
        ([7], {4}),
        ([7, 7], {4, 9}),
        ([7, 8, 1, 2], {4, 3, 5}),
        ([0, *range(10, 17)], {4, 17}),
        ([*range(10, 17)], {4, 17}),
        ([*range(11, 17)], {4}),  # the sequence starts inside the word
        ([10, 10, *range(12, 17)], {4}),
    ):
        assert allowed_next(make_request([1, *tokens], 1, bad_words=words)) == everything - banned, tokens
        in_prompt = make_request(tokens, len(tokens), bad_words=words)
        assert allowed_next(in_prompt) == everything - {4}, "a prompt starts no bad word"


def test_allowed_tokens_are_the_only_ones_and_bias_moves_only_them():
    logits = np.linspace(5, -5, VOCAB, dtype=np.float32)
    wish = {"allowed_token_ids": [20, 30, 30, 40], "temperature": 0.0}
    cases = (
        ({}, 20),
        ({"logit_bias": {40: 5.0}}, 40),
        ({"logit_bias": {0: 100.0, 30: 2.0}}, 30),
        ({"bad_words": [(1, 20)]}, 30),
        ({"min_tokens": 5, "eos": (20, 30)}, 40),
        ({"min_tokens": 5, "eos": (20, 30), "logit_bias": {20: 100.0}}, 40),
    )
    for more, expected in cases:
        request = make_request([0, 1], 1, **wish, **more)
        assert allowed_next(request) <= {20, 30, 40}
        assert sample(logits[None], *make_batch([request])).token[0] == expected, more


def test_a_negative_bias_applies_once_and_a_duplicate_allowed_token_does_not_double_it():
    logits = np.zeros(VOCAB, np.float32)
    requests = [
        make_request([1], 1, logit_bias={5: -1.5}),
        make_request([1], 1, logit_bias={5: -1.5}, allowed_token_ids=[5, 5, 6]),
    ]
    edited = edited_logits(np.stack([logits, logits]), *make_batch(requests))
    assert edited[0, 5] == edited[1, 5] == -1.5
    assert edited[1, 6] == 0


@pytest.mark.parametrize("kind", ["normal", "ties", "extreme", "adjacent"])
def test_top_k_keeps_exactly_the_k_best_and_their_ties(kind):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=VOCAB) * 10
    logits = {
        "normal": normal,
        "ties": np.round(normal / 10),
        "extreme": np.sign(normal) * 10.0 ** rng.uniform(-30, 30, VOCAB),
        "adjacent": np.append(0, -1 - rng.permutation(VOCAB - 1) * 2.0**-23),  # below 0: consecutive float32s
    }[kind].astype(np.float32)
    ks = [*range(1, ROWS - 4), 40, 60, VOCAB - 2, VOCAB - 1, VOCAB]
    requests = [make_request([1], 1, top_k=k) for k in ks]
    filtered = np.isfinite(filtered_logits(np.tile(logits, (ROWS, 1)), *make_batch(requests)))
    shifted = logits - logits.max()  # float32: what differs by less than a rounding ties
    for k, kept in zip(ks, filtered, strict=True):
        np.testing.assert_array_equal(kept, shifted >= np.sort(shifted)[-k])


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_always_the_best():
    logits = np.log(np.array([0.05, 0.4, 0.25, 0.2, 0.1], np.float32))
    for top_p, expected in (
        (1e-9, {1}),
        (0.39, {1}),
        (0.41, {1, 2}),
        (0.66, {1, 2, 3}),
        (0.9, {1, 2, 3, 4}),
        (0.96, {*range(5)}),
    ):
        assert allowed_next(make_request([1], 1, top_p=top_p), logits) == expected, top_p
    # After top_k 2 the two are renormalized: 0.4 / 0.65 = 0.615.
    assert allowed_next(make_request([1], 1, top_p=0.61, top_k=2), logits) == {1}
    assert allowed_next(make_request([1], 1, top_p=0.62, top_k=2), logits) == {1, 2}
    assert allowed_next(make_request([1], 1, top_p=0.1), np.zeros(5, np.float32)) == {*range(5)}  # ties stay together


def test_penalties_tell_prompt_tokens_from_sampled_ones():
    tokens, prompt_len = [10, 11, 11, 12, 12, 13] + [14] * 1090, 3
    wish = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    logits = np.ones((1, VOCAB), np.float32)
    edited = edited_logits(logits, *make_batch([make_request(tokens, prompt_len, **wish)]))
    expected = np.ones(VOCAB)
    expected[[10, 11]] = 0.5
    expected[[12, 13, 14]] = 0.5 - 0.25 - 0.5 * np.array([2, 1, 1090])
    np.testing.assert_allclose(edited[0], expected)


# --- what it costs


def test_plain_rows_get_the_same_tokens_from_a_plain_step():
    rng = np.random.default_rng(3)
    limits = [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2, "top_k": 9}]
    wishes = [{"temperature": [0.0, 0.7, 1.5][i % 3], **limits[i % 4]} for i in range(ROWS)]
    rows = [make_request([1, 2, 3], 2, seed=i, **wish) for i, wish in enumerate(wishes)]
    assert all(is_plain(row) for row in rows)
    logits = rng.normal(size=(ROWS, VOCAB)).astype(np.float32)
    logits[5, 7] = np.nan
    logits[6] = 0.0
    inp, tables = make_batch(rows)
    plain = sampler.sample(jnp.asarray(logits), inp, tables, plain=True)
    np.testing.assert_array_equal(plain.token, sample(logits, inp, tables).token)
    assert plain.token[5] == -1 and plain.logprob is None


def test_what_no_row_asks_for_is_behind_a_condition():
    logits, _, inp, tables = random_batch(13, 8)
    jaxpr = jax.make_jaxpr(sampler.sample)(logits, inp, tables)
    always = {equation.primitive.name for equation in jaxpr.eqns}
    for inner in (e.params["jaxpr"] for e in jaxpr.eqns if "jaxpr" in e.params):
        always |= {equation.primitive.name for equation in inner.jaxpr.eqns}
    everywhere = str(jaxpr)
    costly = {
        "scatter",
        "scatter-add",
        "gather",
        "top_k",
        "sort",
        "exp",
        "log",
        "log1p",
        "while",
        "scan",
        "threefry2x32",
    }
    assert not always & costly
    assert {"scatter-add", "top_k", "log1p", "exp"} <= {name for name in costly if name in everywhere}
