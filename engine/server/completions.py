"""/v1/completions: from its request to groups, and from their completions to its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from engine.request import Group, Logprobs, Update
from engine.server import wire
from engine.server.prompts import encode, need_tokenizer
from engine.server.protocol import CompletionRequest

if TYPE_CHECKING:
    from engine.replicas import Engine


class LogprobLists(msgspec.Struct):
    """Parallel lists, an entry for each token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []  # characters from the beginning of the choice's text


class Choice(msgspec.Struct, omit_defaults=True):
    index: int
    text: str
    logprobs: LogprobLists | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: list[Any] | None = None


class Completion(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: wire.Usage | None = None


def prepare(core: Engine, request: CompletionRequest, answer_id: str) -> list[Group]:
    """-> a group for each prompt. Slow (it tokenizes), thread-safe. Errors: ValueError."""
    params = request.sampling_params()
    salt = request.cache_salt or ""
    groups = []
    for i, prompt in enumerate(request.prompts()):
        if isinstance(prompt, str):
            prompt = encode(core, prompt, add_special_tokens=request.add_special_tokens is not False)
        request_id = f"{answer_id}-{i}"
        groups.append(core.prepare(request_id, prompt, params, priority=request.priority or 0, cache_salt=salt))
    return groups


class CompletionFormat:
    """Writes the answer to one CompletionRequest (a `wire.Format`)."""

    def __init__(self, head: wire.Head, request: CompletionRequest, groups: Sequence[Group], core: Engine):
        self.head = head
        self.request = request
        self.prompts = request.prompts()
        self.n = request.n or 1
        self.core = core
        self.token_text = wire.token_text(core)
        self.positions = {group.request_id: i for i, group in enumerate(groups)}
        self.continuous_usage = bool(request.stream_options and request.stream_options.continuous_usage_stats)
        self.groups = groups
        self.completion_tokens = 0  # of the stream, so far
        self._offsets: dict[int, int] = {}  # of each streamed choice: where its next token begins

    def response(self, groups: Sequence[Group]) -> bytes:
        choices = []
        for group in groups:
            for completion in group.completions:
                choice = self._choice(
                    Update(
                        group,
                        completion.index,
                        completion.text,
                        completion.token_ids,
                        completion.logprobs,
                        completion.finish_reason,
                        completion.stop_reason,
                    )
                )
                choice.prompt_logprobs = wire.prompt_logprobs(
                    group.prompt_logprobs, self.request.prompt_logprobs, self.token_text
                )
                choices.append(choice)
        choices.sort(key=lambda choice: choice.index)
        return wire.encode(self._body(choices, wire.usage(groups, self.completion_tokens)))

    def chunks(self, update: Update) -> bytes:
        choice = self._choice(update)
        if not choice.text and not (choice.logprobs and choice.logprobs.tokens) and update.finish_reason is None:
            return b""
        usage = wire.usage(self.groups, self.completion_tokens) if self.continuous_usage else None
        return wire.event(self._body([choice], usage))

    def usage_chunk(self, groups: Sequence[Group]) -> bytes:
        return wire.event(self._body([], wire.usage(groups, self.completion_tokens)))

    def _body(self, choices: list[Choice], usage: wire.Usage | None) -> Completion:
        return Completion(self.head.id, "text_completion", self.head.created, self.head.model, choices, usage)

    def _choice(self, update: Update) -> Choice:
        """-> the choice with what the update adds, after the prompt if this is its first and echo is asked for."""
        position = self.positions[update.group.request_id]
        index = position * self.n + update.index
        first = index not in self._offsets
        offset = self._offsets.setdefault(index, 0)
        text = ""
        logprobs = None if self.request.logprobs is None else LogprobLists()
        if first and self.request.echo:
            text = self._prompt_text(update.group, self.prompts[position])
            if logprobs is not None:
                group = update.group
                offset = self._append(logprobs, offset, group.prompt_token_ids, group.prompt_logprobs or [])
        if self.request.only_echo:
            return Choice(index, text, logprobs, update.finish_reason and "length", None)
        self.completion_tokens += len(update.token_ids)
        if logprobs is not None:
            self._offsets[index] = self._append(logprobs, offset, update.token_ids, update.logprobs or [])
        return Choice(index, text + update.text, logprobs, update.finish_reason, update.stop_reason)

    def _prompt_text(self, group: Group, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return need_tokenizer(self.core).decode(prompt, skip_special_tokens=group.params.skip_special_tokens)

    def _append(
        self, lists: LogprobLists, offset: int, token_ids: Sequence[int], entries: Sequence[Logprobs | None]
    ) -> int:
        """Append the tokens' entries. -> the offset behind them."""
        for token_id, entry in zip(token_ids, entries, strict=True):
            if entry is None:  # the first of a prompt: nothing comes before it
                text = self.token_text(token_id)
                lists.token_logprobs.append(None)
                lists.top_logprobs.append(None)
            else:
                text = wire.text_of(token_id, entry[token_id], self.token_text)
                lists.token_logprobs.append(wire.clamp(entry[token_id].logprob))
                lists.top_logprobs.append(self._top(entry))
            lists.tokens.append(text)
            lists.text_offset.append(offset)
            offset += len(text)
        return offset

    def _top(self, entry: Logprobs) -> dict[str, float]:
        """-> logprobs by text, the chosen token's among them. Of tokens with the same text the most likely counts:
        whoever compares the chosen one's logprob with the highest must not take a second-best for the best.
        """
        top: dict[str, float] = {}
        most = (self.request.logprobs or 0) + 1
        for token_id, candidate in list(entry.items())[:most]:
            text = wire.text_of(token_id, candidate, self.token_text)
            top[text] = max(wire.clamp(candidate.logprob), top.get(text, wire.LOWEST_LOGPROB))
        return top
