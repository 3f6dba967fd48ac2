"""/v1/chat/completions: from its messages to a group, and from its completions to its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from engine.request import Group, Logprob, Logprobs, Update
from engine.server import wire
from engine.server.prompts import encode
from engine.server.protocol import ChatRequest

if TYPE_CHECKING:
    from engine.core import EngineCore


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    content: list[TokenLogprob]


class Message(msgspec.Struct):
    role: str
    content: str


class Choice(msgspec.Struct):
    index: int
    message: Message
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatCompletion(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: wire.Usage
    prompt_logprobs: list[Any] | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatChunk(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: wire.Usage | None = None


def prepare(core: EngineCore, request: ChatRequest, prompt: str, answer_id: str) -> Group:
    """-> the group for a rendered chat. Slow (it tokenizes), thread-safe. Errors: ValueError.

    The template has written the special tokens already, so none are added unless they are asked for.
    """
    token_ids = encode(core, prompt, add_special_tokens=bool(request.add_special_tokens))
    params, salt = request.sampling_params(), request.cache_salt or ""
    return core.prepare(answer_id, token_ids, params, priority=request.priority or 0, cache_salt=salt)


class ChatFormat:
    """Writes the answer to one ChatRequest (a `wire.Format`)."""

    def __init__(self, head: wire.Head, request: ChatRequest, group: Group, core: EngineCore):
        self.head = head
        self.request = request
        self.group = group
        self.token_text = wire.token_text(core)
        self.continuous_usage = bool(request.stream_options and request.stream_options.continuous_usage_stats)
        self.completion_tokens = 0  # of the stream, so far
        self._begun: set[int] = set()  # choices whose role is sent

    def response(self, groups: Sequence[Group]) -> bytes:
        (group,) = groups
        choices = [
            Choice(
                completion.index,
                Message("assistant", completion.text),
                self._logprobs(completion.token_ids, completion.logprobs),
                completion.finish_reason,
                completion.stop_reason,
            )
            for completion in sorted(group.completions, key=lambda completion: completion.index)
        ]
        usage = wire.usage(groups, sum(len(completion.token_ids) for completion in group.completions))
        return wire.encode(
            ChatCompletion(
                self.head.id,
                "chat.completion",
                self.head.created,
                self.head.model,
                choices,
                usage,
                wire.prompt_logprobs(group.prompt_logprobs, self.request.prompt_logprobs, self.token_text),
            )
        )

    def chunks(self, update: Update) -> bytes:
        self.completion_tokens += len(update.token_ids)
        begin = b""
        if update.index not in self._begun:
            self._begun.add(update.index)
            begin = self._event(ChunkChoice(update.index, Delta("assistant", ""), None, None, None))
        logprobs = self._logprobs(update.token_ids, update.logprobs)
        if not update.text and not (logprobs and logprobs.content) and update.finish_reason is None:
            return begin
        delta = Delta(content=update.text or None)
        return begin + self._event(ChunkChoice(update.index, delta, logprobs, update.finish_reason, update.stop_reason))

    def usage_chunk(self, groups: Sequence[Group]) -> bytes:
        return wire.event(self._chunk([], wire.usage(groups, self.completion_tokens)))

    def _event(self, choice: ChunkChoice) -> bytes:
        usage = wire.usage((self.group,), self.completion_tokens) if self.continuous_usage else None
        return wire.event(self._chunk([choice], usage))

    def _chunk(self, choices: list[ChunkChoice], usage: wire.Usage | None) -> ChatChunk:
        return ChatChunk(self.head.id, "chat.completion.chunk", self.head.created, self.head.model, choices, usage)

    def _logprobs(self, token_ids: Sequence[int], entries: Sequence[Logprobs] | None) -> ChoiceLogprobs | None:
        if not self.request.logprobs:
            return None
        content = []
        for token_id, entry in zip(token_ids, entries or [], strict=True):
            likely = sorted(entry.items(), key=lambda item: -wire.clamp(item[1].logprob))
            top = [TopLogprob(*self._token(*item)) for item in likely[: self.request.top_logprobs or 0]]
            content.append(TokenLogprob(*self._token(token_id, entry[token_id]), top))
        return ChoiceLogprobs(content)

    def _token(self, token_id: int, entry: Logprob) -> tuple[str, float, list[int]]:
        text = wire.text_of(token_id, entry, self.token_text)
        return text, wire.clamp(entry.logprob), list(text.encode())
