"""The tokenizer inside a GGUF file: its `tokenizer.*` metadata made into a `Tokenizer`, checked entry by entry.

Three kinds of vocabulary are known: byte-level BPE ("gpt2"), whose merges are in the file and whose way to split a text
into words is only named there; SentencePiece's BPE ("llama"), whose merges follow from the tokens' scores; and the same
with its merges in the file ("gemma4").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from engine.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from engine.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # of the token types, those that are no ordinary text
_SPACE = "▁"  # what SentencePiece writes for a space
MODELS = ("gpt2", "llama", "gemma4")
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


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata describe.

    Errors: ValueError naming the key that is missing, malformed, inconsistent or not supported.
    """
    model = _get(metadata, _PREFIX + "model", str)
    if model not in MODELS:
        raise ValueError(f"{_PREFIX}model: {model!r:.80} is not supported; {', '.join(MODELS)} are")
    space_prefix = _get(metadata, _PREFIX + "add_space_prefix", bool, model == "llama")
    tokens = _tokens(metadata)
    types = _numbers(metadata, _PREFIX + "token_type", len(tokens))
    if model == "llama" and not space_prefix:
        tokens = _with_runs_of_spaces(tokens, types)
    vocab = {token: i for i, token in enumerate(tokens)}
    # SentencePiece's own conventions hold where such a file says nothing.
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {
        name: _token_id(metadata, f"{_PREFIX}{name}_token_id", len(tokens), defaults.get(name))
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    unknown = None if ids["unknown"] is None else tokens[ids["unknown"]]
    add_bos = True
    if model == "gpt2":
        pre = _pre_tokenizer(metadata)
        backend = _byte_level_bpe(vocab, _merges(metadata, vocab), pre)
        add_bos = pre.add_bos
    else:
        if unknown is None and any(f"<0x{byte:02X}>" not in vocab for byte in range(256)):
            raise ValueError(f"{_PREFIX}unknown_token_id: is missing, as are byte tokens: some text would be lost")
        merges = _merges_by_score(metadata, vocab, types) if model == "llama" else _merges(metadata, vocab)
        backend = _sentencepiece_bpe(vocab, merges, unknown, space_prefix)

    phi3 = model == "llama" and _get(metadata, "general.architecture", str, None) == "phi3"
    backend.add_tokens(_added_tokens(tokens, types, phi3))
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
        chat_template=_chat_templates(metadata),
        special_tokens={name: tokens[i] for name, key in names.items() if (i := ids[key]) is not None},
    )


def _with_runs_of_spaces(tokens: list[str], types: np.ndarray) -> list[str]:
    """-> the tokens, with user-defined ones of spaces alone as SentencePiece has them: as runs of ▁, as in Gemma.

    Converters write spaces there, for a llama.cpp that looks for such tokens in the text as it was given.
    """
    restored, taken = list(tokens), set(tokens)
    for i in np.flatnonzero(types == _USER_DEFINED).tolist():
        run = _SPACE * len(tokens[i])
        if not tokens[i].strip(" ") and run not in taken:
            restored[i] = run
    return restored


def _added_tokens(tokens: Sequence[str], types: np.ndarray, phi3: bool) -> list[AddedToken]:
    """-> the tokens that are found in a text before it is split into words.

    The metadata lack what Phi-3's say of themselves: they take the whitespace after them along.
    """
    special = np.isin(types, (_CONTROL, _UNKNOWN))
    plain = ("<unk>", "<s>", "<|endoftext|>")
    added = np.flatnonzero(special | (types == _USER_DEFINED)).tolist()
    rstrip = {i: phi3 and tokens[i] not in plain for i in added}
    return [AddedToken(tokens[i], special=bool(special[i]), normalized=False, rstrip=rstrip[i]) for i in added]


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    backend.normalizer = pre.normalizer()
    backend.pre_tokenizer = pre.splitter()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None, space_prefix: bool
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        # Every piece between special tokens gets it, as in SentencePiece, which sees each of them as a text.
        spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
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


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """-> the templates by name; the one that has none is "default"."""
    key = "tokenizer.chat_template"
    names = {key: "default"} | {name: name[len(key) + 1 :] for name in metadata if name.startswith(key + ".")}
    return {name: _get(metadata, full, str) for full, name in names.items() if full in metadata}


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

    Of tokens with one score, as runs of spaces have, the first in the vocabulary goes first. Runs that are user-defined
    are found before anything is merged, whatever score a converter gave them: the longest goes first.
    """
    key = _PREFIX + "scores"
    scores = _numbers(metadata, key, len(vocab)).astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{key}: entry {np.argmin(np.isfinite(scores))} is not finite")
    tokens = list(vocab)
    runs = [i for i in np.flatnonzero(types == _USER_DEFINED).tolist() if not tokens[i].strip(_SPACE)]
    scores[runs] = scores.max() + [len(tokens[i]) for i in runs]
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
