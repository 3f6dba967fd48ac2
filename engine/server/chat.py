"""/v1/chat/completions: from its messages to a group, and from its completions to its JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from engine.request import CompletionOutput, Group, Logprob, Logprobs, Update
from engine.server import wire
from engine.server.prompts import encode
from engine.server.protocol import ChatRequest
from engine.server.tool_calls import SPECIAL_MARKS, ToolCall, ToolCallReader

if TYPE_CHECKING:
    from engine.replicas import Engine


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


class Function(msgspec.Struct):
    name: str
    arguments: str  # JSON


class Call(msgspec.Struct):
    id: str
    type: str
    function: Function


class Message(msgspec.Struct, omit_defaults=True):
    role: str
    content: str | None  # null when there are calls and nothing else
    tool_calls: list[Call] | None = None


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


class CallDelta(Call):
    index: int = 0  # of the call in its message; clients want it even when it is 0


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


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


def tool_call_parser(request: ChatRequest, parser: str | None) -> str | None:
    """-> the server's parser, if the answer to this request may have tool calls."""
    return parser if request.tools and request.tool_choice != "none" else None


def prepare(core: Engine, request: ChatRequest, prompt: str, answer_id: str, parser: str | None) -> Group:
    """-> the group for a rendered chat. Slow (it tokenizes), thread-safe. Errors: ValueError.

    The template has written the special tokens already, so none are added unless they are asked for.
    """
    token_ids = encode(core, prompt, add_special_tokens=bool(request.add_special_tokens))
    params, salt = request.sampling_params(), request.cache_salt or ""
    if parser in SPECIAL_MARKS:
        params = dataclasses.replace(params, skip_special_tokens=False)
    return core.prepare(answer_id, token_ids, params, priority=request.priority or 0, cache_salt=salt)


class ChatFormat:
    """Writes the answer to one ChatRequest (a `wire.Format`). With a `parser`, tool calls are told apart from text."""

    def __init__(self, head: wire.Head, request: ChatRequest, group: Group, core: Engine, parser: str | None):
        self.head = head
        self.request = request
        self.group = group
        self.token_text = wire.token_text(core)
        self.continuous_usage = bool(request.stream_options and request.stream_options.continuous_usage_stats)
        self.completion_tokens = 0  # of the stream, so far
        self.parser = parser
        self._begun: set[int] = set()  # choices whose role is sent
        self._readers: dict[int, ToolCallReader] = {}  # of the stream, by choice

    def response(self, groups: Sequence[Group]) -> bytes:
        (group,) = groups
        choices = [self._choice(c) for c in sorted(group.completions, key=lambda completion: completion.index)]
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

    def _choice(self, completion: CompletionOutput) -> Choice:
        message, finish_reason = Message("assistant", completion.text), completion.finish_reason
        if self.parser is not None:
            reader = ToolCallReader(self.parser)
            text, calls = _split(reader.feed(completion.text, final=True))
            message.content, message.tool_calls = text or None if calls else text, calls or None
            finish_reason = _finish_reason(finish_reason, reader)
        logprobs = self._logprobs(completion.token_ids, completion.logprobs)
        return Choice(completion.index, message, logprobs, finish_reason, completion.stop_reason)

    def chunks(self, update: Update) -> bytes:
        self.completion_tokens += len(update.token_ids)
        begin = b""
        if update.index not in self._begun:
            self._begun.add(update.index)
            begin = self._event(ChunkChoice(update.index, Delta("assistant", ""), None, None, None))
        logprobs = self._logprobs(update.token_ids, update.logprobs)
        delta, finish_reason = self._delta(update)
        if delta == Delta() and not (logprobs and logprobs.content) and finish_reason is None:
            return begin
        return begin + self._event(ChunkChoice(update.index, delta, logprobs, finish_reason, update.stop_reason))

    def _delta(self, update: Update) -> tuple[Delta, str | None]:
        """-> what is new of a choice, and why it ended."""
        if self.parser is None:
            return Delta(content=update.text or None), update.finish_reason
        reader = self._readers.setdefault(update.index, ToolCallReader(self.parser))
        before = reader.num_calls
        text, calls = _split(reader.feed(update.text, final=update.finish_reason is not None))
        deltas = [CallDelta(call.id, call.type, call.function, before + i) for i, call in enumerate(calls)]
        return Delta(content=text or None, tool_calls=deltas or None), _finish_reason(update.finish_reason, reader)

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


def _split(parts: Sequence[str | ToolCall]) -> tuple[str, list[Call]]:
    """-> the text among the parts, and the calls."""
    calls = [part for part in parts if isinstance(part, ToolCall)]
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [Call(call.id, "function", Function(call.name, call.arguments)) for call in calls]


def _finish_reason(reason: str | None, reader: ToolCallReader) -> str | None:
    return "tool_calls" if reason == "stop" and reader.num_calls else reason
