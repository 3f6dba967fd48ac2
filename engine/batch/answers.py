"""How the engine answers one line: the server's own requests and formats, without the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.batch.rows import Line
from engine.request import Group, RequestError
from engine.server import chat, completions, embeddings, wire
from engine.server.errors import ApiError
from engine.server.prompts import need_tokenizer
from engine.server.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, decode, template_arguments

if TYPE_CHECKING:
    from engine.replicas import Engine


@dataclass(frozen=True)
class Generation:
    """A line whose answer has to be generated: its groups, and what writes the answer when they have finished."""

    groups: Sequence[Group]
    write: Callable[[], bytes]


@dataclass(frozen=True)
class Embedding:
    """A line whose texts are to be embedded."""

    request: EmbeddingRequest
    prompts: list[list[int]]

    def write(self, model: str, vectors: Sequence[np.ndarray]) -> bytes:
        return wire.encode(embeddings.answer(self.request, model, vectors, sum(map(len, self.prompts))))


def prepare(core: Engine, line: Line, model: str, parser: str | None) -> Generation | Embedding:
    """-> what the line asks for, tokenized and checked. Slow, for any thread. Errors: ApiError."""
    try:
        match line.url:
            case "/v1/embeddings":
                request = decode(EmbeddingRequest, line.body)
                _check_model(request.model, model)
                return Embedding(request, embeddings.prepare(core, request))
            case "/v1/completions":
                return _completion(core, decode(CompletionRequest, line.body), model)
            case _:
                return _chat(core, decode(ChatRequest, line.body), model, parser)
    except RequestError as error:
        raise ApiError(400, str(error), param=error.field) from None
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def _completion(core: Engine, request: CompletionRequest, model: str) -> Generation:
    _check(request, model)
    head = wire.new_head("cmpl-", model)
    groups = completions.prepare(core, request, head.id)
    form = completions.CompletionFormat(head, request, groups, core)
    return Generation(groups, lambda: form.response(groups))


def _chat(core: Engine, request: ChatRequest, model: str, parser: str | None) -> Generation:
    _check(request, model)
    head = wire.new_head("chatcmpl-", model)
    prompt = need_tokenizer(core).apply_chat_template(**template_arguments(request))
    own = chat.tool_call_parser(request, parser)
    group = chat.prepare(core, request, prompt, head.id, own)
    form = chat.ChatFormat(head, request, group, core, own)
    return Generation([group], lambda: form.response([group]))


def _check(request: CompletionRequest | ChatRequest, model: str) -> None:
    if request.stream:
        raise RequestError("stream", "a batch has nobody to stream to; leave it out")
    _check_model(request.model, model)


def _check_model(asked: str | None, model: str) -> None:
    if asked is not None and asked != model:
        raise RequestError(
            "model", f"there is no {asked[:200]!r} here, only {model!r}; --served-model-name gives its name"
        )
