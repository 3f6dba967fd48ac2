"""What sampling must know of a request: its flags, and its row of SlotTables, made and checked on the host."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from engine.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_EDITS, Request, RequestError
from engine.sampler import ACTIVE, USES_BAD_WORDS, USES_EDITS, WANTS_LOGPROBS, SlotTables

FOREVER = 2**31 - 1  # an `edit_until` that never comes


def empty_tables(num_slots: int, max_model_len: int, vocab_size: int) -> SlotTables:
    """-> tables without any wish in them."""
    return SlotTables(
        tokens=jnp.zeros((num_slots, max_model_len), jnp.int32),
        edit_ids=jnp.full((num_slots, MAX_LOGIT_EDITS), vocab_size, jnp.int32),
        edit_values=jnp.zeros((num_slots, MAX_LOGIT_EDITS), jnp.float32),
        edit_until=jnp.zeros((num_slots, MAX_LOGIT_EDITS), jnp.int32),
        edit_allow=jnp.zeros((num_slots,), bool),
        bad_words=jnp.full((num_slots, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, jnp.int32),
    )


def request_flags(request: Request) -> int:
    """-> SamplingInput.flags for a row of this request that samples."""
    params = request.params
    held_back = params.min_tokens > 0 and request.stop_token_ids
    flags = ACTIVE
    flags |= USES_EDITS if held_back or params.logit_bias or params.allowed_token_ids else 0
    flags |= USES_BAD_WORDS if request.bad_words else 0
    flags |= WANTS_LOGPROBS if params.logprobs is not None else 0
    return flags


def is_plain(request: Request) -> bool:
    """-> whether the request wants neither logprobs nor its logits edited: what `sample(plain=True)` can do."""
    params = request.params
    return params.logprobs is None and params.prompt_logprobs is None and not needs_slot_row(request)


def needs_slot_row(request: Request) -> bool:
    """-> whether sampling this request reads SlotTables, which then must hold its `slot_row` and its tokens."""
    params = request.params
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return penalties != (1, 0, 0) or bool(request_flags(request) & (USES_EDITS | USES_BAD_WORDS))


def check_request(request: Request, vocab_size: int) -> None:
    """Raises RequestError if the request names tokens outside the vocabulary, has more edits or bad words than a
    slot holds, or allows no token that it doesn't also ban."""
    edits, words = _logit_edits(request, vocab_size), _bad_words(request, vocab_size)
    banned = {token for token, value, _ in edits if value == -math.inf} | {word[0] for word in words if len(word) == 1}
    if (allowed := request.params.allowed_token_ids) and banned.issuperset(allowed):
        raise RequestError("allowed_token_ids", "bad_words or min_tokens ban every one of them; allow another token")


def slot_row(request: Request, max_model_len: int, vocab_size: int) -> SlotTables:
    """-> the request's part of SlotTables, as numpy arrays without the leading slots axis.

    allowed_token_ids and logit_bias become one edit for each allowed token (a bias on any other has no effect), or
    one for each bias; min_tokens bans the tokens that end the sequence until so many were sampled. Errors: those of
    `check_request`.
    """
    check_request(request, vocab_size)
    assert len(request.token_ids) <= max_model_len
    tokens = np.zeros(max_model_len, np.int32)
    tokens[: len(request.token_ids)] = request.token_ids

    edit_ids = np.full(MAX_LOGIT_EDITS, vocab_size, np.int32)
    edit_values = np.zeros(MAX_LOGIT_EDITS, np.float32)
    edit_until = np.zeros(MAX_LOGIT_EDITS, np.int32)
    for i, edit in enumerate(_logit_edits(request, vocab_size)):
        edit_ids[i], edit_values[i], edit_until[i] = edit

    bad_words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32)
    for i, word in enumerate(_bad_words(request, vocab_size)):
        bad_words[i, -len(word) :] = word
    edit_allow = np.array(request.params.allowed_token_ids is not None)
    return SlotTables(tokens, edit_ids, edit_values, edit_until, edit_allow, bad_words)  # type: ignore[arg-type]


def _logit_edits(request: Request, vocab_size: int) -> list[tuple[int, float, int]]:
    """-> (token id, what is added to its logit, the position from which it no longer is)."""
    params = request.params
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        _check_ids(name, getattr(params, name) or (), vocab_size)
    bias = params.logit_bias or {}
    if params.allowed_token_ids is not None:
        bias = {token: bias.get(token, 0.0) for token in params.allowed_token_ids}
    edits = [(token, value, FOREVER) for token, value in bias.items()]
    if params.min_tokens > 0:
        until = min(request.num_prompt_tokens + params.min_tokens, FOREVER)
        edits += [(token, -math.inf, until) for token in sorted(request.stop_token_ids)]
    if len(edits) > MAX_LOGIT_EDITS:
        field = "allowed_token_ids" if params.allowed_token_ids else "logit_bias" if bias else "min_tokens"
        message = f"{len(edits)} logit edits with the ids that min_tokens holds back; give fewer"
        raise RequestError(field, f"{message}: at most MAX_LOGIT_EDITS = {MAX_LOGIT_EDITS} are supported")
    return edits


def _bad_words(request: Request, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    if len(request.bad_words) > MAX_BAD_WORDS:
        count = f"{len(request.bad_words)} token sequences after tokenization"
        raise RequestError("bad_words", f"{count}; at most MAX_BAD_WORDS = {MAX_BAD_WORDS} are supported")
    for word in request.bad_words:
        if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
            limit = f"MAX_BAD_WORD_TOKENS = {MAX_BAD_WORD_TOKENS}"
            raise RequestError("bad_words", f"a word of {len(word)} tokens; 1 to {limit} are supported")
        _check_ids("bad_words", word, vocab_size)
    return request.bad_words


def _check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(name, f"token id {token} is not in the vocabulary, ids are below {vocab_size}")
