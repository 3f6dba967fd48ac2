"""SentencePiece vocabularies out of GGUF metadata, against SentencePiece's own algorithm."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.vocab import tokenizer_from_gguf
from tests.engine.vocabularies import GGML, NORMAL, PIECES, gemma_metadata, gpt2_metadata, llama_metadata


def sentencepiece(text: str, metadata: Mapping[str, Any]) -> list[int]:
    """SentencePiece's BPE as such: of all neighbours whose union is a token, join those of the best score, leftmost."""
    vocab = {token: i for i, token in enumerate(metadata[GGML + "tokens"])}
    scores = metadata[GGML + "scores"]
    symbols: list[str] = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [symbols[i] + symbols[i + 1] for i in range(len(symbols) - 1)]
        best = heapq.nsmallest(1, ((-scores[vocab[t]], i) for i, t in enumerate(joined) if t in vocab))
        if not best:
            break
        i = best[0][1]
        symbols[i : i + 2] = [joined[i]]
    return [i for s in symbols for i in ([vocab[s]] if s in vocab else [vocab[f"<0x{b:02X}>"] for b in s.encode()])]


LLAMA = llama_metadata()
LLAMA_TOKENIZER = tokenizer_from_gguf(LLAMA)


@settings(max_examples=500, deadline=None, database=None)
@given(st.text("aaabnnse- é世", min_size=1, max_size=30))
def test_merges_by_score_are_sentencepieces(text: str):
    assert LLAMA_TOKENIZER.encode(text, add_special_tokens=False) == sentencepiece(text, LLAMA)


def test_sentencepiece_falls_back_to_bytes_and_comes_back():
    ids = LLAMA_TOKENIZER.encode("a世\n", add_special_tokens=False)
    assert ids[1:] == [3 + byte for byte in "世\n".encode()]
    for text in ("a世\n", " banana  ana ", "🌍é", ""):
        assert LLAMA_TOKENIZER.decode(LLAMA_TOKENIZER.encode(text)) == text


def test_sentencepiece_adds_bos_and_a_space_in_front_unless_told_otherwise():
    space, a, space_a = (3 + 256 + PIECES.index(piece) for piece in ("▁", "a", "▁a"))
    assert LLAMA_TOKENIZER.encode("a") == [1, space_a]
    assert LLAMA_TOKENIZER.encode("") == [1]
    assert LLAMA_TOKENIZER.bos_token_id == 1
    assert LLAMA_TOKENIZER.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    bare = tokenizer_from_gguf(llama_metadata(add_space_prefix=False, add_bos_token=False, add_eos_token=True))
    assert bare.encode("a") == [a, 2]
    assert bare.encode("e a")[1:] == [space_a, 2]
    assert bare.decode([space, a]) == " a"


def test_sentencepiece_finds_special_tokens_and_ends_turns():
    end = len(LLAMA[GGML + "tokens"]) - 1
    assert LLAMA_TOKENIZER.encode("a</s>a<end_of_turn>")[2] == 2
    assert LLAMA_TOKENIZER.encode("a</s>a<end_of_turn>")[-1] == end
    assert LLAMA_TOKENIZER.eos_token_ids == (2, end)


def test_only_phi3s_tokens_take_whitespace_along():
    phi3 = {"general.architecture": "phi3"}
    tokenizer = tokenizer_from_gguf(LLAMA | phi3)
    assert tokenizer.encode("<end_of_turn>\n a") == LLAMA_TOKENIZER.encode("<end_of_turn>a")
    assert tokenizer.encode("<end_of_turn>\n a") != LLAMA_TOKENIZER.encode("<end_of_turn>\n a")
    assert tokenizer.encode("<s>\n a") == LLAMA_TOKENIZER.encode("<s>\n a")
    assert tokenizer_from_gguf(gpt2_metadata() | phi3).encode("<think>\na") == [258, *b"\na"]  # Phi-4


def test_byte_tokens_are_not_spelled_by_text():
    metadata = llama_metadata(add_bos_token=False)
    parts = ["<", "0", "x", "4", "1", ">", "<0", "<0x", "<0x4", "1>"]
    metadata[GGML + "tokens"] += parts
    metadata[GGML + "scores"] = np.append(metadata[GGML + "scores"], np.full(len(parts), -99))
    metadata[GGML + "token_type"] = np.append(metadata[GGML + "token_type"], [NORMAL] * len(parts))
    tokenizer = tokenizer_from_gguf(metadata)
    assert [tokenizer.token_text(i) for i in tokenizer.encode("<0x41>")] == [" ", "<0x4", "1>"]


@pytest.mark.parametrize("space", [" ", "▁"])  # as converters write them now, and as they once did
def test_runs_of_spaces_are_found_before_anything_is_merged(space: str):
    tokenizer = tokenizer_from_gguf(gemma_metadata([space * 2, space * 3, space * 4]))
    first = tokenizer.vocab_size - 3
    assert [tokenizer.token_text(i) for i in tokenizer.encode("  a")] == ["  ", "a"]
    assert [tokenizer.token_text(i) for i in tokenizer.encode(" a")] == [" a"]
    assert tokenizer.encode("   ") == [first + 1]
    assert tokenizer.encode("    ") == [first + 2]
    assert tokenizer.encode("▁▁▁▁") == [first + 2]
    assert tokenizer.decode(tokenizer.encode("a   b")) == "a   b"


def test_gemma4_has_sentencepieces_tokens_and_merges_of_its_own():
    metadata = gemma_metadata(
        ["▁▁"], model="gemma4", scores=None, bos_token_id=1, add_bos_token=None, add_space_prefix=None
    )
    metadata[GGML + "merges"] = ["▁ ▁", "▁ a", "a n"]
    tokenizer = tokenizer_from_gguf(metadata | {GGML + "unknown_token_id": 0})
    assert [tokenizer.token_text(i) for i in tokenizer.encode("  an a世")] == ["<s>", "  ", "an", " a", *"\ufffd" * 3]
    assert tokenizer.encode("世")[1:] == [3 + byte for byte in "世".encode()]


def test_without_byte_tokens_a_character_is_unknown():
    metadata = llama_metadata(add_bos_token=False)
    kept = [0, 1, 2, *range(259, len(metadata[GGML + "tokens"]))]
    metadata |= {GGML + "tokens": [metadata[GGML + "tokens"][i] for i in kept]}
    metadata |= {GGML + key: metadata[GGML + key][kept] for key in ("scores", "token_type")}
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("世界a") == [3 + PIECES.index("▁"), 0, 3 + PIECES.index("a")]
