"""Tokenizers out of GGUF metadata: the real SmolLM2, byte-level vocabularies, and broken metadata."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from engine.pre_tokenizers import PRE_TOKENIZERS
from engine.tokenizer import Tokenizer
from engine.vocab import tokenizer_from_gguf
from engine.weights.gguf import open_gguf
from tests.engine.vocabularies import CONTROL, GGML, NORMAL, byte_alphabet, gpt2_metadata, llama_metadata

DATA = pathlib.Path(__file__).parents[1] / "data"
# Made with the parts of which SmolLM2's own tokenizer.json is built (Digits, then ByteLevel with its own pattern), not
# with ours: [{"text": ..., "ids": [...]}, ...].
GOLDENS = json.loads((DATA / "smollm2_tokens.json").read_text())


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: pathlib.Path) -> Mapping[str, Any]:
    return open_gguf(smollm2_gguf).metadata


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Mapping[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(smollm2)


# SmolLM2


def test_smollm2_tokenizes_as_the_goldens_say(smollm2_tokenizer: Tokenizer):
    assert len(GOLDENS) >= 30
    for golden in GOLDENS:
        assert smollm2_tokenizer.encode(golden["text"]) == golden["ids"], golden["text"]


def test_smollm2_texts_come_back(smollm2_tokenizer: Tokenizer):
    for golden in GOLDENS:
        text = golden["text"].replace("\x00", "").replace("\x07", "")  # the vocabulary lacks some control characters
        assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text), skip_special_tokens=False) == text


def test_smollm2_equals_its_native_parts_on_any_text(smollm2: Mapping[str, Any], smollm2_tokenizer: Tokenizer):
    tokens = smollm2[GGML + "tokens"]
    merges = [tuple(merge.split(" ")) for merge in smollm2[GGML + "merges"]]
    native = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    native.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:17]])

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(st.text() | st.sampled_from([" 12", "\n\n ", "don't", "½", "<|im_end|>", "\u0301"])).map("".join))
    def check(text: str):
        assert smollm2_tokenizer.encode(text) == native.encode(text).ids

    check()


def test_smollm2_splits_numbers_into_digits(smollm2_tokenizer: Tokenizer):
    texts = [smollm2_tokenizer.token_text(i) for i in smollm2_tokenizer.encode("year 2024")]
    assert texts == ["year", " ", "2", "0", "2", "4"]


def test_smollm2_has_its_special_tokens(smollm2_tokenizer: Tokenizer):
    tokenizer = smollm2_tokenizer
    assert tokenizer.vocab_size == 49152
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2, 0)  # <|im_end|>, and <|endoftext|> by its text
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert tokenizer.decode([1, 28, 2]) == tokenizer.decode([28])
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


# Byte-level BPE


# Pieces of one text by pre-tokenizer. Those of llama-bpe, qwen2, gpt-4o and deepseek-v3 are what these models' own
# tokenizer.json files make of it, those of gpt-2 and smollm what the tokenizers library's parts for them make.
SPLITS = json.loads((DATA / "pre_tokenizer_splits.json").read_text())
SAME_SPLITS = {
    "phi-2": "gpt-2", "mpt": "gpt-2", "olmo": "gpt-2", "starcoder": "smollm", "refact": "smollm",
    "command-r": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe",
    "dbrx": "llama-bpe", "deepseek-r1-qwen": "qwen2", "llama4": "gpt-4o",
}  # fmt: skip


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS.keys() - {"falcon"}))
def test_every_pre_tokenizer_splits_as_its_models_do(pre: str):
    splitter = tokenizer_from_gguf(gpt2_metadata(pre=pre)).backend.pre_tokenizer
    assert splitter is not None
    expected = SPLITS[SAME_SPLITS.get(pre, pre)]
    text = "".join(expected)
    assert [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)] == expected


# Up to Hebrew: what is punctuation beyond depends on the version of Unicode, and the two libraries have different ones.
OLD_TEXT = st.text(st.characters(max_codepoint=0x58A) | st.sampled_from("中文–…“😀"))


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(OLD_TEXT | st.sampled_from([" 1234", "½²ü", "$<^`|", "'ll ", "\n\n "])).map("".join))
def test_falcon_splits_as_its_native_parts_do(text: str):
    splitter = tokenizer_from_gguf(gpt2_metadata(pre="falcon")).backend.pre_tokenizer
    native = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(),
            pre_tokenizers.Split(Regex("[0-9]{3}"), "isolated"),
        ]
    )
    assert splitter is not None
    assert splitter.pre_tokenize_str(text) == native.pre_tokenize_str(text)


@pytest.mark.parametrize("pre", ["mpt", "olmo", "command-r", "qwen2", "qwen35"])
def test_some_vocabularies_compose_characters_first(pre: str):
    composed = tokenizer_from_gguf(gpt2_metadata(pre=pre)).encode("e\u0301")
    assert composed == tokenizer_from_gguf(gpt2_metadata(pre=pre)).encode("é")
    assert composed != tokenizer_from_gguf(gpt2_metadata()).encode("e\u0301")


def test_merges_apply_in_their_order():
    tokenizer = tokenizer_from_gguf(gpt2_metadata(["b c", "a b", "a bc"]))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("abcab")] == ["abc", "ab"]
    assert [tokenizer.token_text(i) for i in tokenizer.encode("ab cab")] == ["ab", " ", "c", "ab"]


def test_a_word_that_is_a_token_is_not_merged_where_the_model_says_so():
    merges = ["b c", "a b", "ab c"]  # b c goes first, so that merges never make abc
    assert len(tokenizer_from_gguf(gpt2_metadata(merges)).encode("abc")) == 2
    for pre in ("llama-bpe", "smaug-bpe", "gpt-4o", "tekken"):
        whole = tokenizer_from_gguf(gpt2_metadata(merges, pre=pre))
        assert whole.encode("abc", add_special_tokens=False) == [258]


def test_control_and_user_defined_tokens_are_found_in_text():
    tokenizer = tokenizer_from_gguf(gpt2_metadata())
    ids = tokenizer.encode("a<think>b<|im_end|>")
    assert ids == [ord("a"), 258, ord("b"), 257]
    assert tokenizer.decode(ids) == "a<think>b"  # only control tokens are skipped
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<think>b<|im_end|>"
    assert len(tokenizer.encode("<｜pad｜>")) > 1  # unused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [97]),
        ({"add_bos_token": True}, [256, 97]),
        ({"add_eos_token": True}, [97, 257]),
        ({"add_bos_token": True, "add_eos_token": True}, [256, 97, 257]),
        ({"pre": "llama-bpe"}, [256, 97]),
        ({"pre": "smaug-bpe"}, [97]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [97]),
    ],
)
def test_bos_and_eos_are_added_as_the_metadata_say(changes: dict[str, Any], expected: list[int]):
    tokenizer = tokenizer_from_gguf(gpt2_metadata(**changes))
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_every_token_that_ends_a_turn_is_an_eos():
    assert tokenizer_from_gguf(gpt2_metadata()).eos_token_ids == (257,)
    assert tokenizer_from_gguf(gpt2_metadata(eos_token_id=256)).eos_token_ids == (256, 257)  # <|im_end|> by its text
    tokenizer = tokenizer_from_gguf(gpt2_metadata(eos_token_id=256, eot_token_id=258, eom_token_id=3))
    assert tokenizer.eos_token_ids == (256, 258, 3, 257)


def test_text_that_only_looks_like_an_end_of_turn_is_no_eos():
    metadata = gpt2_metadata(eos_token_id=256)
    metadata[GGML + "token_type"][257] = NORMAL
    assert tokenizer_from_gguf(metadata).eos_token_ids == (256,)


def test_harmony_messages_do_not_end_the_answer():
    metadata = gpt2_metadata(eos_token_id=256)
    metadata[GGML + "tokens"] += ["<|end|>", "<|return|>", "<|call|>"]
    metadata[GGML + "token_type"] = np.append(metadata[GGML + "token_type"], [CONTROL] * 3)
    assert tokenizer_from_gguf(metadata).eos_token_ids == (256, 257, 261, 262)


def test_chat_templates_are_taken_over():
    assert tokenizer_from_gguf(gpt2_metadata()).chat_template is None
    named = {"tokenizer.chat_template": "a", "tokenizer.chat_template.rag": "b", "tokenizer.chat_templates": ["rag"]}
    assert tokenizer_from_gguf(gpt2_metadata() | named).chat_templates == {"default": "a", "rag": "b"}
    metadata = gpt2_metadata() | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    assert tokenizer_from_gguf(metadata).apply_chat_template([{"role": "user", "content": "Hi"}]) == "<s>Hi"


# Broken metadata

NUM_LLAMA_TOKENS = len(llama_metadata()[GGML + "tokens"])
BROKEN = {
    "no model": (gpt2_metadata(model=None), "model: is missing"),
    "unknown model": (gpt2_metadata(model="t5"), "model: 't5'"),
    "model of a wrong type": (gpt2_metadata(model=5), "model: must be of type str"),
    "no pre-tokenizer": (gpt2_metadata(pre=None), "pre: is missing"),
    "pre-tokenizer not known to the converter": (gpt2_metadata(pre="default"), "pre: 'default' is not supported"),
    "unknown pre-tokenizer": (gpt2_metadata(pre="kimi-k2"), "pre: 'kimi-k2' is not supported"),
    "no tokens": (gpt2_metadata(tokens=None), "tokens: is missing"),
    "empty tokens": (gpt2_metadata(tokens=[]), "tokens: is empty"),
    "tokens that are numbers": (gpt2_metadata(tokens=np.arange(260)), "tokens: must be"),
    "tokens twice": (gpt2_metadata(tokens=[*byte_alphabet(), "x1", "x2", "a", "x3"]), "tokens: entries 97 and 258"),
    "a huge token": (gpt2_metadata(tokens=[*byte_alphabet(), "x1", "x2", "x3", "x" * 5000]), "tokens: 'xxx.*5000"),
    "no types": (gpt2_metadata(token_type=None), "token_type: is missing"),
    "too few types": (gpt2_metadata(token_type=np.ones(5, np.int32)), "token_type: must be an array of 260"),
    "types that are text": (gpt2_metadata(token_type=["1"] * 260), "token_type: must be"),
    "merges that are nothing": (gpt2_metadata() | {GGML + "merges": None}, "merges: must be of type list"),
    "merge of an unknown token": (gpt2_metadata() | {GGML + "merges": ["a bc"]}, "merges: entry 0, 'a bc'"),
    "merge to an unknown token": (gpt2_metadata() | {GGML + "merges": ["a b"]}, "merges: entry 0, 'a b'"),
    "merge of one token": (gpt2_metadata() | {GGML + "merges": ["a"]}, "merges: entry 0, 'a'"),
    "merge of three": (gpt2_metadata() | {GGML + "merges": ["a b c"]}, "merges: entry 0, 'a b c'"),
    "bos past the end": (gpt2_metadata(bos_token_id=260), "bos_token_id: 260 is not one of the 260"),
    "eos below 0": (gpt2_metadata(eos_token_id=-1), "eos_token_id: -1"),
    "eot of 2^32 - 1": (gpt2_metadata(eot_token_id=2**32 - 1), "eot_token_id: 4294967295"),
    "pad that is true": (gpt2_metadata(padding_token_id=True), "padding_token_id: must be of type int"),
    "bos to add but none": (gpt2_metadata(bos_token_id=None, add_bos_token=True), "add_bos_token: .*bos_token_id"),
    "eos to add but none": (gpt2_metadata(eos_token_id=None, add_eos_token=True), "add_eos_token: .*eos_token_id"),
    "add_bos that is a number": (gpt2_metadata(add_bos_token=1), "add_bos_token: must be of type bool"),
    "neither bytes nor unknown": (gpt2_metadata(model="gemma4"), "unknown_token_id: is missing, as are byte tokens"),
    "no scores": (llama_metadata(scores=None), "scores: is missing"),
    "too many scores": (llama_metadata(scores=np.zeros(999)), "scores: must be an array of"),
    "a score that is NaN": (llama_metadata(scores=np.full(NUM_LLAMA_TOKENS, np.nan)), "scores: entry 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_metadata_is_refused_by_key(case: str):
    metadata, message = BROKEN[case]
    with pytest.raises(ValueError, match=f"^{GGML}{message}"):
        tokenizer_from_gguf(metadata)


def test_a_chat_template_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="^tokenizer.chat_template: must be of type str"):
        tokenizer_from_gguf(gpt2_metadata() | {"tokenizer.chat_template": ["a"]})
