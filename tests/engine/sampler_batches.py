"""Batches for the sampler's tests, and a plain numpy oracle of what becomes of each row's logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from engine import sampler
from engine.request import Group, Request, RequestMetrics, SamplingParams
from engine.sampler import SamplingInput, SlotTables
from engine.slots import empty_tables, needs_slot_row, request_flags, slot_row

VOCAB, MAX_LEN, NUM_LOGPROBS = 97, 1100, 5
ROWS = 32  # most tests share this size, and with it one executable

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
