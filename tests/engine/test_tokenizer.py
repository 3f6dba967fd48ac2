"""Tokenizer: encoding, decoding, the text of one token."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from engine.request import RequestError
from engine.tokenizer import Tokenizer
from engine.tokenizer_files import load_tokenizer
from tests.engine.tokenizers_for_tests import byte_level_backend, sentencepiece_backend, wrap

BYTE_LEVEL = wrap(byte_level_backend())
SENTENCEPIECE = wrap(sentencepiece_backend())


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


def test_special_tokens_are_added_as_the_post_processor_says():
    plain = BYTE_LEVEL.encode("hello", add_special_tokens=False)
    assert BYTE_LEVEL.encode("hello") == [BYTE_LEVEL.bos_token_id, *plain]
    assert SENTENCEPIECE.encode("hello") == SENTENCEPIECE.encode("hello", add_special_tokens=False)


def test_special_tokens_are_decoded_only_when_asked_for():
    ids = BYTE_LEVEL.encode("hello world</s>")
    assert BYTE_LEVEL.decode(ids) == "hello world"
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "<s>hello world</s>"


def test_truncation_and_padding_of_the_file_are_ignored():
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert len(wrap(backend).encode("a b c d e f g")) == 14


@pytest.mark.parametrize("text", ["", "\0", "a\0b", "\u2028\ufeff", "👩‍👩‍👧", "\U0010ffff", "e\u0301"])
def test_odd_text_comes_back_unchanged(smollm2: Tokenizer, text: str):
    for tokenizer in (BYTE_LEVEL, smollm2):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "\udc80" * 3])
def test_lone_surrogates_are_refused(text: str):
    with pytest.raises(RequestError, match=r"lone surrogate U\+D") as error:
        BYTE_LEVEL.encode(text)
    assert error.value.field == "prompt"


def test_ids_are_below_the_vocabularys_size_also_with_holes():
    backend = byte_level_backend()
    assert wrap(backend).vocab_size == max(backend.get_vocab().values()) + 1
    backend = tokenizers.Tokenizer(models.BPE({"a": 7, "b": 1}, []))
    options: dict[str, Any] = {"bos_token_id": None, "chat_template": None, "special_tokens": {}}
    assert Tokenizer(backend, eos_token_ids=(), **options).vocab_size == 8


def test_ids_without_a_token_have_no_text():
    beyond = BYTE_LEVEL.vocab_size + 5
    assert BYTE_LEVEL.token_text(beyond) == BYTE_LEVEL.decode([beyond]) == ""


def test_token_text_is_that_of_the_token_inside_a_text(smollm2: Tokenizer):
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE, smollm2):
        for text in ("hello world", "a</s>" if tokenizer is not smollm2 else "a<|im_end|>"):
            ids = tokenizer.encode("he" + text, add_special_tokens=False)
            texts = [tokenizer.token_text(i) for i in ids]
            assert "".join(texts).removeprefix(" ") == "he" + text
            assert texts == [tokenizer.token_text(i) for i in ids]
    assert all(smollm2.token_text(i) == smollm2.decode([i], skip_special_tokens=False) for i in range(0, 49152, 97))


def test_token_bytes_are_the_texts(smollm2: Tokenizer):
    text = "a 😀 <|im_start|>é日本"
    ids = smollm2.encode(text)
    everything, plain = (smollm2.token_bytes(skip_special_tokens=skip) for skip in (False, True))
    assert everything is not None and plain is not None
    assert b"".join(everything[i] for i in ids) == text.encode()
    assert b"".join(plain[i] for i in ids).decode() == smollm2.decode(ids) == text.replace("<|im_start|>", "")
    added = BYTE_LEVEL.token_bytes(skip_special_tokens=True)
    assert added is not None and b"".join(added[i] for i in BYTE_LEVEL.encode("é<a b>")) == "é<a b>".encode()
    assert SENTENCEPIECE.token_bytes(skip_special_tokens=True) is None


def test_long_prompts_are_encoded_from_several_threads_while_others_run(smollm2: Tokenizer):
    text = "The quick brown fox jumps over 13 lazy dogs. é😀\n" * 10_000
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(smollm2.encode(text))) for _ in range(2)]
    for thread in threads:
        thread.start()
    turns = 0
    while any(thread.is_alive() for thread in threads):
        turns += 1
        time.sleep(0.001)
    assert turns > 10  # encoding half a million characters takes some tenths of a second
    assert results[0] == results[1]
    assert smollm2.decode(results[0]) == text
