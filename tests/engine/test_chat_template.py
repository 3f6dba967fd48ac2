"""Chat templates: what they may use, what they may not, and what is said when they fail."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from engine.request import RequestError
from engine.tokenizer_files import load_tokenizer
from tests.engine.tokenizers_for_tests import CHAT_TEMPLATE, byte_level_backend, wrap

TOKENIZER = wrap(byte_level_backend(), CHAT_TEMPLATE)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def render(template: str, messages: Any = CHAT, **options: Any) -> str:
    return TOKENIZER.apply_chat_template(messages, chat_template=template, **options)


def test_the_models_template_is_used_with_its_special_tokens():
    assert TOKENIZER.apply_chat_template(CHAT) == "<s>[system] Be brief.\n[user] Hi\n[assistant]"
    assert TOKENIZER.apply_chat_template(CHAT, add_generation_prompt=False) == "<s>[system] Be brief.\n[user] Hi\n"


def test_the_default_model_has_a_template(smollm2_gguf: Path):
    tokenizer = load_tokenizer(smollm2_gguf)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_text_parts_are_joined_by_newlines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"
    assert parts == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_messages_without_content_stay_without():
    calls = {"role": "assistant", "tool_calls": []}
    assert render("{{ 'content' in messages[0] }}", [calls]) == "False"
    assert render("{{ messages[0].content is none }}", [calls | {"content": None}]) == "True"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if true %}\n  x\n  {% endif %}\n", "  x\n"),  # blocks leave no lines and no indentation behind
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}!", "Hi!"),
        ("{{ {'b': 'é<', 'a': 1} | tojson }}", '{"b": "é<", "a": 1}'),
        ("{{ {'b': 1} | tojson(indent=1) }}", '{\n "b": 1\n}'),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ flag }}{{ bos_token }}", "7<s>"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    ],
)
def test_templates_have_what_they_expect(template: str, text: str):
    assert render(template, flag=7) == text


def test_tools_and_the_date_reach_the_template():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert render("{{ tools[0].function.name }}", tools=tools) == "f"
    before = datetime.date.today().year
    assert before <= int(render("{{ strftime_now('%Y') }}")) <= datetime.date.today().year


@pytest.mark.parametrize(
    ("template", "field", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "messages", "roles must alternate"),
        ("{{ 1 / 0 }}", "messages", "ZeroDivisionError"),
        ("{{ messages[9].content.x }}", "messages", "UndefinedError"),
        ("{{ messages.append(1) }}", "messages", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "messages", "SecurityError"),
        ("{{ range(10000000) }}", "messages", "OverflowError"),
        ("{% include 'secret' %}", "messages", "no loader"),
        ("\n{% for %}", "chat_template", "line 2"),
        ("{{ 'x' | nothing }}", "chat_template", "line 1"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat_template", "RecursionError"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "chat_template", "cannot be compiled"),
    ],
)
def test_a_templates_error_names_the_field(template: str, field: str, message: str):
    with pytest.raises(RequestError, match=message) as error:
        render(template)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user"}, "non-empty list"),
        (["hello"], "an object with a role"),
        ([{"content": "hello"}], "an object with a role"),
        ([{"role": "user", "content": 5}], "a text or a list of parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": ["hello"]}], "'text' are supported, got 'hello'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "needs a text"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, message: str):
    with pytest.raises(RequestError, match=message) as error:
        TOKENIZER.apply_chat_template(messages)
    assert error.value.field == "messages"


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, ["f"]])
def test_malformed_tools_are_refused(tools: Any):
    with pytest.raises(RequestError) as error:
        TOKENIZER.apply_chat_template(CHAT, tools=tools)
    assert error.value.field == "tools"


@pytest.mark.parametrize("template", [None, 5])
def test_a_chat_needs_a_template(template: Any):
    with pytest.raises(RequestError, match="pass chat_template|must be a Jinja template") as error:
        wrap(byte_level_backend()).apply_chat_template(CHAT, chat_template=template)
    assert error.value.field == "chat_template"


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch):
    from engine import chat_template

    compiled: list[str] = []
    compile_template = chat_template.compile_template
    monkeypatch.setattr(
        chat_template, "compile_template", lambda source: compiled.append(source) or compile_template(source)
    )
    tokenizer = wrap(byte_level_backend(), CHAT_TEMPLATE)
    for _ in range(3):
        tokenizer.apply_chat_template(CHAT)
    assert compiled == [CHAT_TEMPLATE]
