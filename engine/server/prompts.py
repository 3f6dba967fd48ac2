"""Text to token ids for requests, whose texts may be of any length."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from engine.request import RequestError

if TYPE_CHECKING:
    from engine.replicas import Engine
    from engine.tokenizer import Tokenizer


def need_tokenizer(core: Engine) -> Tokenizer:
    """-> the engine's tokenizer. Errors: RequestError, when it runs without one."""
    if core.tokenizer is None:
        raise RequestError("prompt", "text needs a tokenizer, and this model was loaded without one")
    return core.tokenizer


def encode(core: Engine, text: str, *, add_special_tokens: bool) -> list[int]:
    """-> token ids. Errors: RequestError, at once for a text that is too long whatever its tokens are."""
    tokenizer = need_tokenizer(core)
    limit = core.resolved.max_model_len
    most = limit * _longest_token(tokenizer)
    if len(text) > most:
        raise RequestError("prompt", f"{len(text)} characters, more than {most}, are more than {limit} tokens")
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


@functools.lru_cache(maxsize=8)
def _longest_token(tokenizer: Tokenizer) -> int:
    """-> characters of the longest token as the vocabulary writes it: as long as its text, or longer."""
    return max(map(len, tokenizer.backend.get_vocab()))
