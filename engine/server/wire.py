"""What both kinds of completion put into their answers: usage, logprobs fit for JSON, server-sent events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from engine.request import Group, Logprob, Logprobs, Update

if TYPE_CHECKING:
    from engine.replicas import Engine

LOWEST_LOGPROB = -9999.0  # stands for -inf and NaN, which JSON lacks
DONE = b"data: [DONE]\n\n"

TokenText = Callable[[int], str]

encode = msgspec.json.Encoder().encode


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(frozen=True)
class Head:
    """What stands at the top of an answer and of each of its chunks."""

    id: str
    model: str
    created: int  # seconds since the epoch


class Format(Protocol):
    """Writes the answer to one request, in one of the two dialects."""

    def response(self, groups: Sequence[Group]) -> bytes:
        """-> the whole answer as JSON."""
        ...

    def chunks(self, update: Update) -> bytes:
        """-> server-sent events for one update, b"" if there is nothing to tell."""
        ...

    def usage_chunk(self, groups: Sequence[Group]) -> bytes:
        """-> the event with the usage, at the end of a stream."""
        ...


def new_head(prefix: str, model: str) -> Head:
    return Head(prefix + uuid.uuid4().hex, model, int(time.time()))


def usage(groups: Sequence[Group], completion_tokens: int) -> Usage:
    """-> the usage of a request; a prompt counts once, however many completions it has."""
    prompt_tokens = sum(len(group.prompt_token_ids) for group in groups)
    cached = sum(group.num_cached_tokens for group in groups)
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptTokensDetails(cached))


def event(value: Any) -> bytes:
    """-> one server-sent event with `value` as JSON."""
    return b"data: %b\n\n" % encode(value)


def clamp(logprob: float) -> float:
    """-> a finite number; NaN fails every comparison."""
    return logprob if LOWEST_LOGPROB < logprob < 1.0 else LOWEST_LOGPROB


def token_text(core: Engine) -> TokenText:
    """-> the text of a token, or a stand-in where the engine runs without a tokenizer."""
    return core.tokenizer.token_text if core.tokenizer is not None else "token_id:{}".format


def text_of(token_id: int, entry: Logprob, token_text: TokenText) -> str:
    return token_text(token_id) if entry.decoded_token is None else entry.decoded_token


def prompt_logprobs(
    positions: Sequence[Logprobs | None] | None, most: int | None, token_text: TokenText
) -> list[dict[str, dict[str, Any]] | None] | None:
    """-> vLLM's form: for each prompt token None (the first), or the prompt's token and the `most` likely by id."""
    if most is None or positions is None:
        return None

    def shown(token_id: int, entry: Logprob) -> dict[str, Any]:
        text = text_of(token_id, entry, token_text)
        return {"logprob": clamp(entry.logprob), "rank": entry.rank, "decoded_token": text}

    return [
        None if entries is None else {str(t): shown(t, e) for t, e in list(entries.items())[: most + 1]}
        for entries in positions
    ]
