"""What of a request the host writes for its slot, and which wishes it refuses."""

from __future__ import annotations

import pytest

from engine.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_EDITS, RequestError
from engine.slots import check_request, is_plain, needs_slot_row, slot_row
from tests.engine.sampler_batches import MAX_LEN, VOCAB, make_request


@pytest.mark.parametrize(
    "wish", [{"logprobs": 0}, {"prompt_logprobs": 0}, {"min_tokens": 3}, {"presence_penalty": 0.5},
             {"logit_bias": {1: 1.0}}],
)  # fmt: skip
def test_a_request_whose_logits_are_shown_or_edited_is_not_plain(wish):
    assert not is_plain(make_request([1, 2, 3], 2, eos=(5,), temperature=0.5, **wish))


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
