"""Metadata of small vocabularies, as GGUF files hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

GGML = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def byte_alphabet() -> list[str]:
    """-> the characters that stand for the bytes 0 to 255: themselves where they print, else from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) if byte in printing else chr(256 + others.index(byte)) for byte in range(256)]


def gpt2_metadata(merges: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    """-> a vocabulary of the bytes, what the merges make, and four special tokens, whose ids come last."""
    merges = merges or []
    special = {"<s>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED, "<｜pad｜>": UNUSED}
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in merges] + list(special)
    types = [NORMAL] * (len(tokens) - 4) + list(special.values())
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": merges,
        "token_type": np.array(types, np.int32),
        "bos_token_id": len(tokens) - 4,
        "eos_token_id": len(tokens) - 3,
    }
    return with_changes({GGML + key: value for key, value in metadata.items()}, changes)


def with_changes(metadata: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Set the keys in `changes`; those that are None go."""
    metadata = metadata | {GGML + key: value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


PIECES = [
    "▁", "a", "b", "n", "s", "e", "-", "▁a", "an", "na", "ana", "nan", "▁an", "▁ban", "▁b", "ba", "aa", "aaa", "aaaa",
    "▁▁", "▁▁▁▁", "--", "----", "se", "ses", "es", "sse", "▁banana", "anas", "nas", "é",
]  # fmt: skip


def llama_metadata(**changes: Any) -> dict[str, Any]:
    """-> unknown, bos and eos, the 256 bytes, PIECES with falling scores, and a user-defined token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<end_of_turn>"]
    scores = np.zeros(len(tokens), np.float32)
    scores[259:-1] = -np.random.default_rng(5).permutation(len(PIECES))
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": np.array([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(PIECES) + [USER_DEFINED]),
    }
    return with_changes({GGML + key: value for key, value in metadata.items()}, changes)


def gemma_metadata(runs: list[str], **changes: Any) -> dict[str, Any]:
    """-> a vocabulary without a space prefix, in which `runs` are user-defined and, after a conversion, score -1000."""
    metadata = llama_metadata(add_space_prefix=False, add_bos_token=False)
    tokens = [token for token in metadata[GGML + "tokens"] if token not in ("▁▁", "▁▁▁▁")] + runs
    scores = np.arange(len(tokens)) - 5000.0
    scores[-len(runs) :] = -1000
    scores[tokens.index("▁a")] = -1
    types = np.array([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(tokens))[: len(tokens)]
    types[-len(runs) :] = USER_DEFINED
    return with_changes(
        metadata | {GGML + "tokens": tokens, GGML + "token_type": types, GGML + "scores": scores}, changes
    )
