"""The tokenizer inside a GGUF file: its `tokenizer.*` metadata made into a `Tokenizer`, checked entry by entry.

Two kinds of vocabulary are known: byte-level BPE ("gpt2"), whose merges are in the file and whose way to split a text
into words is only named there, and SentencePiece's BPE ("llama"), whose merges follow from the tokens' scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from engine.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # of the token types, those that are no ordinary text
MAX_TOKEN_LENGTH = 1024  # the longest token known has 512 characters

# Tokens that end an answer whatever the metadata say: files often name only one of a model's several.
END_TOKENS = (
    "<|im_end|>",  # ChatML: Qwen, SmolLM
    "<|endoftext|>",
    "<|eot_id|>",  # Llama 3
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|eot|>",  # Llama 4
    "<end_of_turn>",  # Gemma
    "<|end|>",  # Phi
    "<|return|>",  # gpt-oss
    "<|call|>",
    "<｜end▁of▁sentence｜>",  # DeepSeek
)


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level vocabulary splits text into words, which merges never cross.

    Each pattern (Oniguruma's syntax) splits the pieces that the one before left; a match is a piece, and so is what
    lies between two. `ignore_merges`: a word that is a token is that token, whatever the merges would make of it.
    `add_bos` holds where the metadata don't say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACE
_QWEN2 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACE
_QWEN35 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACE
# Words whose capitals come first: any number of them before at least one small letter, or the other way round.
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}{some}{_SMALL}{more}" for some, more in ("*+", "+*")]
_GPT4O = f"{_CASED[0]}{_SUFFIX}?|{_CASED[1]}{_SUFFIX}?" + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACE
_TEKKEN = f"{_CASED[0]}|{_CASED[1]}" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACE
# The cased letters as DeepSeek's first models list them, which is not quite \p{Lu}\p{Ll}\p{Lt}.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACE,
)

# By the value of tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "default": PreTokenizer((_GPT2,)),
    "gpt-2": PreTokenizer((_GPT2,)),
    "phi-2": PreTokenizer((_GPT2,)),
    "mpt": PreTokenizer((_GPT2,), nfc=True),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "starcoder": PreTokenizer((r"\p{N}", _GPT2)),
    "refact": PreTokenizer((r"\p{N}", _GPT2)),
    "command-r": PreTokenizer((r"\p{N}", _GPT2), nfc=True),
    "llama3": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama-v3": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,), nfc=True),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    "gpt-4o": PreTokenizer((_GPT4O,), ignore_merges=True),
    "llama4": PreTokenizer((_GPT4O,), ignore_merges=True),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata describe.

    Errors: ValueError naming the key that is missing, malformed, inconsistent or not supported.
    """
    model = _get(metadata, _PREFIX + "model", str)
    tokens = _tokens(metadata)
    vocab = {token: i for i, token in enumerate(tokens)}
    types = _numbers(metadata, _PREFIX + "token_type", len(tokens))
    # SentencePiece's own conventions hold where such a file says nothing.
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {
        name: _token_id(metadata, f"{_PREFIX}{name}_token_id", len(tokens), defaults.get(name))
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    if model == "gpt2":
        pre = _pre_tokenizer(metadata)
        backend = _byte_level_bpe(vocab, _merges(metadata, vocab), pre)
        add_bos = pre.add_bos
    elif model == "llama":
        space_prefix = _get(metadata, _PREFIX + "add_space_prefix", bool, True)
        unknown = None if ids["unknown"] is None else tokens[ids["unknown"]]
        backend = _sentencepiece_bpe(vocab, _merges_by_score(metadata, vocab, types), unknown, space_prefix)
        add_bos = True
    else:
        raise ValueError(f"{_PREFIX}model: {model!r:.80} is not supported; 'gpt2' and 'llama' are")

    special = np.isin(types, (_CONTROL, _UNKNOWN))
    added = np.flatnonzero(special | (types == _USER_DEFINED))
    backend.add_tokens([AddedToken(tokens[i], special=bool(special[i]), normalized=False) for i in added])
    around = {
        "first": ids["bos"] if _is_added(metadata, "bos", add_bos, ids) else None,
        "last": ids["eos"] if _is_added(metadata, "eos", False, ids) else None,
    }
    _add_around(backend, {name: (tokens[i], i) for name, i in around.items() if i is not None})

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return Tokenizer(
        backend,
        eos_token_ids=_end_ids(vocab, types, [ids["eos"], ids["eot"], ids["eom"]]),
        bos_token_id=ids["bos"],
        chat_template=_get(metadata, "tokenizer.chat_template", str, None),
        special_tokens={name: tokens[i] for name, key in names.items() if (i := ids[key]) is not None},
    )


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None, space_prefix: bool
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        # Every piece between special tokens gets it, as in SentencePiece, which sees each of them as a text.
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = spaces
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _add_around(backend: tokenizers.Tokenizer, around: dict[str, tuple[str, int]]) -> None:
    """Let every text that is encoded with special tokens begin and end with the "first" and "last" ones given."""
    if around:
        backend.post_processor = processors.TemplateProcessing(
            single=[name for name in ("first", "$A", "last") if name == "$A" or name in around],
            special_tokens=[{"id": name, "ids": [i], "tokens": [token]} for name, (token, i) in around.items()],
        )


def _end_ids(vocab: dict[str, int], types: np.ndarray, named: Sequence[int | None]) -> tuple[int, ...]:
    """-> every token that ends an answer: those that the metadata name, then those known by their text."""
    known = [vocab[text] for text in END_TOKENS if text in vocab]
    ends = [i for i in named if i is not None] + [i for i in known if types[i] in (_CONTROL, _USER_DEFINED)]
    if "<|return|>" in vocab:  # gpt-oss: there <|end|> ends one message of several
        ends = [i for i in ends if i != vocab.get("<|end|>")]
    return tuple(dict.fromkeys(ends))


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = _get(metadata, _PREFIX + "pre", str)
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"{_PREFIX}pre: {name!r:.80} is not supported; {', '.join(PRE_TOKENIZERS)} are")
    return PRE_TOKENIZERS[name]


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    key = _PREFIX + "tokens"
    tokens = _strings(metadata, key)
    if not tokens:
        raise ValueError(f"{key}: is empty")
    if len(set(tokens)) < len(tokens):
        seen: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if seen.setdefault(token, i) != i:
                raise ValueError(f"{key}: entries {seen[token]} and {i} are both {token!r:.80}")
    longest = max(tokens, key=len)
    if len(longest) > MAX_TOKEN_LENGTH:
        raise ValueError(f"{key}: {longest!r:.40}… has {len(longest)} characters, the limit is {MAX_TOKEN_LENGTH}")
    return tokens


def _merges(metadata: Mapping[str, Any], vocab: dict[str, int]) -> list[tuple[str, str]]:
    key = _PREFIX + "merges"
    merges = []
    for i, text in enumerate(_strings(metadata, key)):
        left, _, right = text.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(f"{key}: entry {i}, {text!r:.80}, does not join two tokens to a third")
        merges.append((left, right))
    return merges


def _merges_by_score(metadata: Mapping[str, Any], vocab: dict[str, int], types: np.ndarray) -> list[tuple[str, str]]:
    """-> SentencePiece's merges, best first: it joins those two neighbours whose union has the highest score.

    Of tokens with one score, as runs of spaces have, the first in the vocabulary goes first.
    """
    key = _PREFIX + "scores"
    scores = _numbers(metadata, key, len(vocab)).astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{key}: entry {np.argmin(np.isfinite(scores))} is not finite")
    tokens = list(vocab)
    spelled = ~np.isin(types, (_UNKNOWN, _CONTROL, _BYTE))
    merges = []
    for i in np.argsort(-scores, kind="stable"):
        token = tokens[i] if spelled[i] else ""
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((left, right))
    return merges


_REQUIRED: Any = object()


def _get(metadata: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = metadata.get(key, default)
    if value is _REQUIRED:
        raise ValueError(f"{key}: is missing; convert the model again with a current converter")
    if value is not default and type(value) is not kind:
        raise ValueError(f"{key}: must be of type {kind.__name__}, got {value!r:.80}")
    return value


def _is_added(metadata: Mapping[str, Any], name: str, default: bool, ids: Mapping[str, int | None]) -> bool:
    key = f"{_PREFIX}add_{name}_token"
    added = _get(metadata, key, bool, default)
    if added and ids[name] is None:
        raise ValueError(f"{key}: the token is to be added, but {_PREFIX}{name}_token_id is missing")
    return added


def _token_id(metadata: Mapping[str, Any], key: str, num_tokens: int, default: int | None) -> int | None:
    if key not in metadata:
        return default if default is not None and default < num_tokens else None
    token = _get(metadata, key, int)
    if not 0 <= token < num_tokens:
        raise ValueError(f"{key}: {token} is not one of the {num_tokens} tokens")
    return token


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    strings = _get(metadata, key, list)
    if not all(isinstance(text, str) for text in strings):
        raise ValueError(f"{key}: must be an array of strings")
    return strings


def _numbers(metadata: Mapping[str, Any], key: str, count: int) -> np.ndarray:
    numbers = _get(metadata, key, np.ndarray)
    if numbers.dtype.kind not in "iuf" or numbers.shape != (count,):
        raise ValueError(f"{key}: must be an array of {count} numbers, one a token, got {len(numbers)}")
    return numbers
