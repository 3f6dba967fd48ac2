"""Chat templates: Jinja in a sandbox, with the functions and tags that Hugging Face's templates expect."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
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


def template_from_setting(value: str) -> str:
    """-> the template that an operator names: the text of a file, or the value itself if it is a template.

    Errors: ValueError for a value that is neither, for a file that cannot be read, for what is no Jinja.
    """
    template = value
    if not any(character in value for character in "{}\n"):
        try:
            template = Path(value).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"chat_template: {value!r} is no template and no readable file: {error}") from None
    compile_template(template)
    return template


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
