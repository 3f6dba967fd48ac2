"""Tool calls out of a model's answer, whole or while it streams: a parser for each way in which models write them.

What looks like a call but is none, say because its JSON is broken, stays text: nothing that a model says is lost.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple


class ToolCall(NamedTuple):
    """A function's name and the JSON of its arguments, an object. `id` is ours: the tool's answer will name it."""

    id: str
    name: str
    arguments: str


Found = tuple[str, str]  # a call's name and arguments
Parsed = tuple[list[str | Found], str]  # what can be told, in order, and the end of the text, which may yet be a call


class ToolCallReader:
    """Tells the text of one completion from the calls in it, while it arrives. Each call comes when it is complete."""

    def __init__(self, parser: str):
        self._parse, self._id_length = PARSERS[parser]
        self._held = ""
        self._last: str | Found | None = None  # what was told last
        self.num_calls = 0

    def feed(self, text: str, *, final: bool) -> list[str | ToolCall]:
        """-> what is new, in order: pieces of text, none of them empty, and calls. `final`: no more will come."""
        told, self._held = self._parse(self._held + text, self._last, final)
        told = [part for part in told if part]
        self._last = told[-1] if told else self._last
        return [part if isinstance(part, str) else self._numbered(*part) for part in told]

    def _numbered(self, name: str, arguments: str) -> ToolCall:
        self.num_calls += 1
        return ToolCall(f"call_{uuid.uuid4().hex}"[-self._id_length :], name, arguments)


_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def _hermes(text: str, last: str | Found | None, final: bool) -> Parsed:
    """Qwen and Hermes: <tool_call>{"name": …, "arguments": {…}}</tool_call>, anywhere and more than once."""
    told: list[str | Found] = []
    if isinstance(last, tuple):
        text = text.lstrip()  # the line break between two calls
    while (start := text.find(_OPEN)) >= 0:
        body = text[start + len(_OPEN) :]
        end = _end_of_call(body)
        if end < 0 and not final:
            before = text[:start].rstrip()
            return [*told, before], text[len(before) :]
        call = _call(_json(body[:end] if end >= 0 else body), "arguments")
        after = body[end + len(_CLOSE) :] if end >= 0 else ""
        if call is None:
            told.append(text[: len(text) - len(after)])
            text = after
        else:
            told += [text[:start].rstrip(), call]
            text = after.lstrip()
    held = "" if final else _beginning_of(_OPEN, text)
    return [*told, text[: len(text) - len(held)]], held


def _end_of_call(body: str) -> int:
    """-> where the tag stands that closes a call; -1 if it is still to come. Within a string of the JSON it is text."""
    end = body.find(_CLOSE)
    while end >= 0:
        try:
            json.loads(body[:end])
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string"):
                end = body.find(_CLOSE, end + 1)
                continue
        except (ValueError, RecursionError):
            pass  # broken, but at its end
        return end
    return -1


_PYTHON_TAG = "<|python_tag|>"


def _llama3_json(text: str, last: str | Found | None, final: bool) -> Parsed:
    """Llama 3.1 and later: the answer is {"name": …, "parameters": {…}} and nothing else; `;` separates several."""
    start = text.lstrip()
    tagged = start.startswith(_PYTHON_TAG)
    body = start.removeprefix(_PYTHON_TAG).strip()
    if last is not None or not (body.startswith("{") or (not final and (tagged or _PYTHON_TAG.startswith(start)))):
        return [text], ""
    if not final:
        return [], text
    calls: list[str | Found] = []
    position = 0
    while position < len(body):
        try:
            value, position = _DECODER.raw_decode(body, position)
        except (ValueError, RecursionError):
            return [text], ""
        call = _call(value, "parameters") or _call(value, "arguments")
        if call is None:
            return [text], ""
        calls.append(call)
        position = _SEPARATOR.match(body, position).end()  # pyright: ignore[reportOptionalMemberAccess]  it matches ""
    return calls, ""


_DECODER, _SEPARATOR = json.JSONDecoder(), re.compile(r"[\s;]*")

_CALLS = "[TOOL_CALLS]"
_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)


def _mistral(text: str, last: str | Found | None, final: bool) -> Parsed:
    """Mistral: after the text, [TOOL_CALLS] and a list of {"name": …, "arguments": {…}}; later models repeat the mark
    before each NAME{…}.
    """
    start = text.find(_CALLS)
    if start < 0:
        held = "" if final else _beginning_of(_CALLS, text)
        return [text[: len(text) - len(held)]], held
    before = text[:start].rstrip()
    if not final:
        return [before], text[len(before) :]
    calls: list[Found | None] = []
    for part in filter(None, map(str.strip, text[start:].split(_CALLS))):
        if named := _NAMED.fullmatch(part):
            calls.append(_call({"name": named[1], "arguments": _json(named[2])}, "arguments"))
        else:
            values = _json(part)
            calls += [_call(value, "arguments") for value in values] if isinstance(values, list) else [None]
    found = [call for call in calls if call is not None]
    if not found or len(found) < len(calls):
        return [text], ""
    return [before, *found], ""


def _beginning_of(tag: str, text: str) -> str:
    """-> the end of the text that may be the beginning of the tag, with the space before it."""
    length = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
    before = text[: len(text) - length]
    return text[len(before.rstrip()) :]


def _json(text: str) -> Any:
    """-> what the JSON says; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, key: str) -> Found | None:
    """-> the call that {"name": …, key: {…}} is; None if it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not isinstance(value.get(key), dict):
        return None
    return value["name"], json.dumps(value[key], ensure_ascii=False)


# Name -> parser and the length of its calls' ids, which Mistral's templates want to be 9.
PARSERS: dict[str, tuple[Callable[[str, str | Found | None, bool], Parsed], int]] = {
    "hermes": (_hermes, 37),
    "llama3_json": (_llama3_json, 37),
    "mistral": (_mistral, 9),
}
SPECIAL_MARKS = ("mistral",)  # parsers whose marks are special tokens, which other answers' texts leave out
