"""The messages and tools of a chat, checked and brought into the form that chat templates know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.request import RequestError

# One thing under three names: OpenAI's clients send one of the first two, gpt-oss's template reads the last.
REASONING = ("reasoning_content", "reasoning", "thinking")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """-> copies of the messages: contents turned into texts, arguments of tool calls into objects.

    What an assistant thought is found under whatever name of `REASONING` a template looks for.
    Errors: RequestError("messages").
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages", f"must be a non-empty list, got {messages!r:.80}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("messages", f"[{i}] must be an object with a role, got {message!r:.80}")
        copy = dict(message)
        if "content" in copy:
            copy["content"] = _text(copy["content"], i)
        if copy.get("tool_calls"):
            copy["tool_calls"] = _calls(copy["tool_calls"], i)
        thought = next((copy[name] for name in REASONING if copy.get(name) is not None), None)
        checked.append(copy if thought is None else {**dict.fromkeys(REASONING, thought), **copy})
    return checked


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """-> the tools as dicts. Errors: RequestError("tools")."""
    if tools is None:
        return None
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise RequestError("tools", f"must be a list, got {tools!r:.80}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RequestError("tools", f"[{i}] must be an object with the function's JSON schema, got {tool!r:.80}")
    return [dict(tool) for tool in tools]


def parse_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """-> a copy of an OpenAI tool call, its arguments an object instead of the JSON of one; no arguments are {}.

    Errors: RequestError("messages").
    """
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise RequestError("messages", "each of tool_calls must have a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError("messages", f"a tool call's arguments are not JSON: {error}") from None
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _calls(calls: Any, i: int) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise RequestError("messages", f"[{i}].tool_calls must be a list of objects, got {calls!r:.80}")
    return [parse_arguments(call) for call in calls]


def _text(content: Any, i: int) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise RequestError("messages", f"[{i}].content must be a text or a list of parts, got {content!r:.80}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            what = f"{part!r:.80}" if kind is None else f"a part of type {kind!r:.80}"
            raise RequestError("messages", f"[{i}].content: only parts of type 'text' are supported, got {what}")
        if not isinstance(part.get("text"), str):
            raise RequestError("messages", f"[{i}].content: a text part needs a text, got {part!r:.80}")
        texts.append(part["text"])
    return "\n".join(texts)
