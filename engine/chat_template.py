"""Chat templates: Jinja in a sandbox, with the functions and tags that Hugging Face's templates expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.request import RequestError


class _GenerationTag(Extension):
    """{% generation %} marks what the assistant said, for training; here it only stands around its text."""

    tags = {"generation"}  # noqa: RUF012 - the way jinja2 asks for it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise RequestError("messages", f"the chat template refuses them: {message}")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def compile_template(source: str) -> jinja2.Template:
    """-> a compiled template. It can't change its arguments, nor reach anything but them.

    Errors: RequestError("chat_template").
    """
    if not isinstance(source, str):
        raise RequestError("chat_template", f"must be a Jinja template, got {source!r:.80}")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError("chat_template", f"line {error.lineno}: {error.message}") from None
    except Exception as error:  # Python's compiler has limits of its own, such as on nesting
        raise RequestError("chat_template", f"cannot be compiled: {type(error).__name__}: {error}") from error


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """-> the text. Errors: RequestError("messages"), whatever goes wrong while the template runs."""
    try:
        return template.render(variables)
    except RequestError:
        raise
    except Exception as error:  # a template is a program of its own: it may raise anything
        message = f"the chat template failed on them: {type(error).__name__}: {error}"
        raise RequestError("messages", message) from error


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """-> copies of the messages, their contents turned into texts. Errors: RequestError("messages")."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages", f"must be a non-empty list, got {messages!r:.80}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("messages", f"[{i}] must be an object with a role, got {message!r:.80}")
        checked.append({**message, "content": _text(message["content"], i)} if "content" in message else dict(message))
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
