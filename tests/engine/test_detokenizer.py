"""The incremental detokenizer against decoding the whole output at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.detokenizer import Detokenizer
from engine.request import SamplingParams
from engine.tokenizer import Tokenizer
from engine.tokenizer_files import load_tokenizer
from tests.engine.test_stop_strings import first_stop
from tests.engine.tokenizers_for_tests import byte_level_backend, sentencepiece_backend, wrap

BYTE_LEVEL = wrap(byte_level_backend())
SENTENCEPIECE = wrap(sentencepiece_backend())
TEXTS = ("hello world", "a 😀😀 b", "日本語", " hello  world ", "é\n\tñ", "", "👩‍👩‍👧 he wo")


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], **params) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(**params))
    return "".join(detokenizer.append([i])[0] for i in ids) + detokenizer.flush()


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 1), max_size=40), st.booleans(), st.integers(1, 3))
def test_byte_level_text_equals_the_whole_outputs_for_any_ids(ids: list[int], skip: bool, step: int):
    detokenizer = Detokenizer(BYTE_LEVEL, [], SamplingParams(skip_special_tokens=skip))
    text = ""
    for i in range(0, len(ids), step):
        text += detokenizer.append(ids[i : i + step])[0]
        whole = BYTE_LEVEL.decode(ids[: i + step], skip_special_tokens=skip)
        # All of it is given out at once, but for a character whose bytes are not complete, or half a surrogate.
        assert whole in (text, text + "\ufffd", text + "\ufffd" * 2)
    assert text + detokenizer.flush() == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("skip", [True, False])
def test_the_default_models_text_equals_the_whole_outputs(smollm2_gguf: Path, skip: bool):
    tokenizer = load_tokenizer(smollm2_gguf)
    rng = random.Random(skip)
    for _ in range(20):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(100))]
        for text in rng.sample(TEXTS, 3):
            at = rng.randint(0, len(ids))
            ids[at:at] = ids_of(tokenizer, text)
        prompt = ids_of(tokenizer, "Say hello.")
        assert stream(tokenizer, prompt, ids, skip_special_tokens=skip) == tokenizer.decode(
            ids, skip_special_tokens=skip
        )


@given(st.sampled_from(TEXTS), st.lists(st.sampled_from(TEXTS), max_size=4))
def test_sentencepiece_text_is_what_the_output_adds_to_the_prompt(prompt: str, words: list[str]):
    before, ids = ids_of(SENTENCEPIECE, prompt), [i for word in words for i in ids_of(SENTENCEPIECE, word)]
    whole = SENTENCEPIECE.decode(before + ids)
    assert stream(SENTENCEPIECE, before, ids) == whole[len(SENTENCEPIECE.decode(before)) :]


def test_sentencepiece_keeps_the_space_after_a_token_without_text():
    hello, world = ids_of(SENTENCEPIECE, "hello"), ids_of(SENTENCEPIECE, "world")
    for n in range(1, 20):  # wherever the window's edges are
        ids = [*hello[:1], *hello[-1:] * n, SENTENCEPIECE.vocab_size + 1, *world]
        assert stream(SENTENCEPIECE, [], ids) == SENTENCEPIECE.decode(ids)


def test_sentencepiece_keeps_the_space_after_a_skipped_special_token():
    hello, world = ids_of(SENTENCEPIECE, "hello"), ids_of(SENTENCEPIECE, "world")
    ids = [*hello, *SENTENCEPIECE.eos_token_ids * 20, *world]
    assert stream(SENTENCEPIECE, [], ids) == "hello world"
    assert stream(SENTENCEPIECE, [], ids, skip_special_tokens=False) == "hello" + "</s>" * 20 + " world"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_an_incomplete_character_is_held_back_and_flushed_as_a_replacement(tokenizer: Tokenizer):
    ids = [i for i in ids_of(tokenizer, "😀") if tokenizer.token_text(i) == "\ufffd"]
    assert len(ids) == 4
    detokenizer = Detokenizer(tokenizer, [], SamplingParams())
    assert [detokenizer.append([i])[0] for i in ids] == ["", "", "", "😀"]
    assert detokenizer.flush() == ""
    assert detokenizer.append(ids[:2]) == ("", None)
    assert detokenizer.flush() in ("\ufffd", "\ufffd\ufffd")
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_the_output_completes_the_character_that_the_prompt_ends_in(tokenizer: Tokenizer):
    ids = ids_of(tokenizer, "ab 😀 ab")
    at = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]).endswith("\ufffd"))
    assert stream(tokenizer, ids[: at + 1], ids[at + 1 :]) == "😀 ab"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_bytes_that_are_never_text_do_not_hold_up_the_stream(tokenizer: Tokenizer):
    bad = invalid_id(tokenizer)
    detokenizer = Detokenizer(tokenizer, ids_of(tokenizer, "a"), SamplingParams())
    text = "".join(detokenizer.append([bad])[0] for _ in range(100))
    assert text.count("\ufffd") == len(text) > 90
    assert detokenizer.append(ids_of(tokenizer, "b"))[0].endswith("b")


def invalid_id(tokenizer: Tokenizer) -> int:
    """-> the id of the byte FF, which no UTF-8 contains."""
    token = tokenizer.backend.token_to_id("ÿ" if tokenizer is BYTE_LEVEL else "<0xFF>")
    assert token is not None
    return token


@given(
    st.lists(st.sampled_from(ids_of(BYTE_LEVEL, "ab hello")), max_size=12),
    st.lists(st.text("abelo ", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_stop_strings_end_the_text_where_the_whole_output_says(
    ids: list[int], stops: list[str], include: bool, min_tokens: int, step: int
):
    params = SamplingParams(
        stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=max(16, min_tokens)
    )
    whole = BYTE_LEVEL.decode(ids)
    match = first_stop(whole, stops, len(BYTE_LEVEL.decode(ids[:min_tokens])))
    detokenizer, text, stop = Detokenizer(BYTE_LEVEL, [], params), "", None
    for i in range(0, len(ids), step):
        new, stop = detokenizer.append(ids[i : i + step])
        text += new
        if stop is not None:
            break
    if match is None:
        assert stop is None
        assert text + detokenizer.flush() == whole
        return
    start, end = match
    assert (text, stop) == (whole[: end if include else start], whole[start:end])
    assert (
        len(BYTE_LEVEL.decode(ids[: detokenizer.num_kept - 1]))
        < end
        <= len(BYTE_LEVEL.decode(ids[: detokenizer.num_kept]))
    )
    assert detokenizer.append(ids) == ("", None)
    assert detokenizer.flush() == ""


def test_held_back_text_is_flushed_before_an_incomplete_character():
    detokenizer = Detokenizer(BYTE_LEVEL, [], SamplingParams(stop=["abc"]))
    assert detokenizer.append(ids_of(BYTE_LEVEL, "xab")) == ("x", None)
    assert detokenizer.append([invalid_id(BYTE_LEVEL) - 15]) == ("", None)  # F0, which begins a character
    assert detokenizer.flush() == "ab\ufffd"


def test_without_detokenize_there_is_no_text():
    detokenizer = Detokenizer(BYTE_LEVEL, [], SamplingParams(detokenize=False))
    assert detokenizer.append(ids_of(BYTE_LEVEL, "hello")) == ("", None)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("text", ["hello world ", "😀", "</s>", None])
def test_a_tokens_work_does_not_grow_with_the_output(text: str | None, monkeypatch: pytest.MonkeyPatch):
    decoded: list[int] = []
    decode = SENTENCEPIECE.decode

    def counting(ids: list[int], **options: bool) -> str:
        decoded.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(SENTENCEPIECE, "decode", counting)
    for skip in (True, False):
        detokenizer = Detokenizer(SENTENCEPIECE, list(range(5, 200)), SamplingParams(skip_special_tokens=skip))
        for token_id in 100 * (ids_of(SENTENCEPIECE, text) if text else [invalid_id(SENTENCEPIECE)]):
            detokenizer.append([token_id])
    assert max(decoded) <= 32
