"""The sampler against a plain numpy oracle of each row, and its draws against the distribution they claim."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from engine import sampler
from engine.request import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_EDITS,
    Group,
    Request,
    RequestError,
    RequestMetrics,
    SamplingParams,
)
from engine.sampler import SampleOutput, SamplingInput, SlotTables
from engine.slots import check_request, empty_tables, is_plain, needs_slot_row, request_flags, slot_row

VOCAB, MAX_LEN, NUM_LOGPROBS = 97, 1100, 5
ROWS = 32  # most tests share this size, and with it one executable
DRAWS = 200_000

sample = jax.jit(lambda *args: sampler.sample(*args, num_logprobs=NUM_LOGPROBS))
filtered_logits = jax.jit(lambda *args: sampler.filtered_logits(sampler.edited_logits(*args), args[1]))
edited_logits = jax.jit(sampler.edited_logits)


def make_request(tokens, prompt_len, *, seed=0, eos=(), bad_words=(), **params) -> Request:
    chosen = SamplingParams(max_tokens=None, **params)
    group = Group("r", None, list(tokens[:prompt_len]), chosen, RequestMetrics(0.0))
    stops = frozenset(eos) | frozenset(chosen.stop_token_ids or ())
    return Request(
        group, 0, chosen, list(tokens), prompt_len, 10_000, seed, tuple(eos), stops, tuple(map(tuple, bad_words))
    )


def make_batch(requests, vocab_size=VOCAB, max_len=MAX_LEN) -> tuple[SamplingInput, SlotTables]:
    """-> the device's view: row i samples the next token of request i, whose slot is another."""
    slots = np.random.default_rng(1).permutation(len(requests)).astype(np.int32)
    tables = jax.tree.map(np.array, empty_tables(len(requests), max_len, vocab_size))
    for request, slot in zip(requests, slots, strict=True):
        if needs_slot_row(request):
            for table, value in zip(
                jax.tree.leaves(tables),
                jax.tree.leaves(slot_row(request, max_len, vocab_size)),
                strict=True,
            ):
                table[slot] = value
    params = [request.params for request in requests]
    column = lambda name: np.array([getattr(p, name) for p in params], np.float32)
    inp = SamplingInput(
        temperature=column("temperature"),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=column("top_p"),
        min_p=column("min_p"),
        repetition_penalty=column("repetition_penalty"),
        frequency_penalty=column("frequency_penalty"),
        presence_penalty=column("presence_penalty"),
        seed=np.array([[r.seed >> 32, r.seed & 0xFFFFFFFF] for r in requests], np.uint32),
        position=np.array([len(r.token_ids) for r in requests], np.int32),
        prompt_len=np.array([r.num_prompt_tokens for r in requests], np.int32),
        slot=slots,
        flags=np.array([request_flags(r) for r in requests], np.int32),
    )
    return jax.tree.map(jnp.asarray, inp), jax.tree.map(jnp.asarray, tables)


def random_request(rng, vocab_size=VOCAB) -> Request:
    """-> a request with each parameter off, on, or at an extreme."""
    ids = lambda n: [int(t) for t in rng.integers(0, vocab_size, n)]
    pick = lambda *values: values[rng.integers(len(values))]
    length = int(pick(1, 2, 40, MAX_LEN - 1))
    tokens = ids(length)
    bad_words = [ids(rng.integers(1, 4)) for _ in range(pick(0, 0, 3))]
    if bad_words and length > 7:
        bad_words += [tokens[-1:] + ids(1), tokens[-7:] + ids(1), [tokens[-1] - 1, *ids(1)]]
        bad_words = [word for word in bad_words if min(word) >= 0]
    allowed = pick(None, None, list({*range(60, 70), *ids(20)}))
    return make_request(
        tokens,
        int(rng.integers(1, length + 1)),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        eos=(3, 5),
        bad_words=bad_words,
        temperature=pick(0.0, 1e-6, 0.5, 1.0, 3.0),
        top_k=pick(-1, 0, 1, 7, VOCAB, 10**9),
        top_p=pick(1.0, 1.0, 1e-6, 0.3, 0.95),
        min_p=pick(0.0, 0.0, 0.02, 0.5, 1.0),
        repetition_penalty=pick(1.0, 1.0, 0.7, 1.8),
        frequency_penalty=pick(0.0, 0.0, -0.4, 1.1),
        presence_penalty=pick(0.0, 0.0, -0.6, 1.5),
        min_tokens=pick(0, 0, 1, 30, 2**31 - 1),
        stop_token_ids=pick(None, ids(3)),
        logit_bias=pick(None, {t: float(rng.uniform(-9, 9)) for t in ids(9)}),
        allowed_token_ids=allowed,
        logprobs=pick(None, 0, 5),
    )


def oracle_edited(logits: np.ndarray, request: Request) -> np.ndarray:
    """-> one row's logits after edits, bad words and penalties, in vLLM's order."""
    params, tokens, out = request.params, request.token_ids, logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        out[[t for t in range(len(out)) if t not in params.allowed_token_ids]] = -np.inf
    outputs = tokens[request.num_prompt_tokens :]
    for word in request.bad_words:
        if len(word) - 1 <= len(outputs) and outputs[len(outputs) - len(word) + 1 :] == list(word[:-1]):
            out[word[-1]] = -np.inf
    if request.num_output_tokens < params.min_tokens:
        out[list(request.stop_token_ids)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        out[token] += bias
    for token in set(tokens):
        repetition = params.repetition_penalty
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token in tokens[request.num_prompt_tokens :]:
        out[token] -= params.frequency_penalty
    for token in set(tokens[request.num_prompt_tokens :]):
        out[token] -= params.presence_penalty
    return out


def oracle_filtered(edited: np.ndarray, params: SamplingParams) -> np.ndarray:
    """-> one row's logits / temperature, shifted to a best of 0, with what min_p, top_k and top_p cut at -inf."""
    if params.temperature < 1e-5:
        return edited - edited.max()
    scaled = (edited - edited.max()) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    odds = np.exp(scaled[order])
    keep = odds >= params.min_p
    if 0 < params.top_k < len(order):
        keep &= scaled[order] >= scaled[order][params.top_k - 1]
    if params.top_p < 1:
        odds = np.where(keep, odds, 0) / odds[keep].sum()
        keep &= np.cumsum(odds) - odds < params.top_p
    out = np.full(len(scaled), -np.inf)
    out[order[keep]] = scaled[order[keep]]
    return out


def random_batch(seed: int, rows: int = ROWS) -> tuple[np.ndarray, list[Request], SamplingInput, SlotTables]:
    rng = np.random.default_rng(seed)
    requests = [random_request(rng) for _ in range(rows)]
    logits = (rng.normal(size=(rows, VOCAB)) * 4).astype(np.float32)
    return logits, requests, *make_batch(requests)


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


def test_seed_position_and_token_each_change_the_noise():
    base = np.array([[1, 2]], np.uint32), np.array([5], np.int32)
    noise = sampler.gumbel(*map(jnp.asarray, base), 1000)
    others = ([[2, 2]], [5]), ([[1, 3]], [5]), ([[1, 2]], [6]), ([[2, 1]], [5])
    for seed, position in others:
        other = sampler.gumbel(jnp.array(seed, jnp.uint32), jnp.array(position, jnp.int32), 1000)
        assert np.mean(noise == other) < 0.01
    assert len(np.unique(noise)) > 990
    np.testing.assert_array_equal(noise[:, :100], sampler.gumbel(*map(jnp.asarray, base), 100))


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


# --- the draws


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


SMALL = (np.random.default_rng(3).normal(size=50) * 1.5).astype(np.float32)


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


@pytest.mark.parametrize(
    "wish", [{"logprobs": 0}, {"prompt_logprobs": 0}, {"min_tokens": 3}, {"presence_penalty": 0.5},
             {"logit_bias": {1: 1.0}}],
)  # fmt: skip
def test_a_request_whose_logits_are_shown_or_edited_is_not_plain(wish):
    assert not is_plain(make_request([1, 2, 3], 2, eos=(5,), temperature=0.5, **wish))


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


# --- prompt logprobs


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


# --- the host's side


@pytest.mark.parametrize(
    ("wish", "needed"),
    [
        ({}, False),
        ({"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "logprobs": 3, "stop_token_ids": [4]}, False),
        ({"min_tokens": 4}, False),
        ({"min_tokens": 4, "eos": (3,)}, True),
        ({"min_tokens": 4, "stop_token_ids": [3]}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"logit_bias": {1: 1.0}}, True),
        ({"allowed_token_ids": [1]}, True),
        ({"bad_words": [(1, 2)]}, True),
    ],
    ids=str,
)
def test_only_requests_with_rare_wishes_need_a_slot_row(wish, needed):
    assert needs_slot_row(make_request([1, 2], 2, **wish)) is needed


@pytest.mark.parametrize(
    ("wish", "field", "said"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias", str(VOCAB)),
        ({"allowed_token_ids": [1, 5000]}, "allowed_token_ids", "5000"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids", str(VOCAB)),
        ({"bad_words": [(1, VOCAB)]}, "bad_words", str(VOCAB)),
        ({"bad_words": [()]}, "bad_words", "0 tokens"),
        ({"bad_words": [(1,) * (MAX_BAD_WORD_TOKENS + 1)]}, "bad_words", "MAX_BAD_WORD_TOKENS = 8"),
        ({"bad_words": [(1,)] * (MAX_BAD_WORDS + 1)}, "bad_words", "MAX_BAD_WORDS = 64"),
        ({"allowed_token_ids": [3, 4], "eos": (3, 4), "min_tokens": 1}, "allowed_token_ids", "min_tokens"),
        ({"allowed_token_ids": [3, 4], "bad_words": [(3,), (4,)]}, "allowed_token_ids", "bad_words"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_met_is_refused_by_name(wish, field, said):
    request = make_request([1], 1, **wish)
    for refuse in (lambda: check_request(request, VOCAB), lambda: slot_row(request, MAX_LEN, VOCAB)):
        with pytest.raises(RequestError, match=said) as error:
            refuse()
        assert error.value.field == field


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "min_tokens"])
def test_too_many_logit_edits_are_refused_with_the_limit(field):
    many = range(MAX_LOGIT_EDITS)
    wish = {
        "logit_bias": {"logit_bias": dict.fromkeys(many, 1.0), "min_tokens": 1, "eos": (3,)},
        "allowed_token_ids": {"allowed_token_ids": list(many), "min_tokens": 1, "eos": (3,)},
        "min_tokens": {"stop_token_ids": list(many), "min_tokens": 1, "eos": (4000,)},
    }[field]
    with pytest.raises(RequestError, match=f"1025 .* MAX_LOGIT_EDITS = {MAX_LOGIT_EDITS}") as error:
        check_request(make_request([1], 1, **wish), 5000)
    assert error.value.field == field
    check_request(make_request([1], 1, **(wish | {"eos": (3,), "min_tokens": 0})), 5000)
