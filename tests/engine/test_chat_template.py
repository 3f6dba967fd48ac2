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


def test_a_tool_calls_arguments_are_an_object_for_the_template():
    def arguments(given: Any) -> str:
        call = {"type": "function", "function": {"name": "f", "arguments": given}}
        messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        text = render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", messages)
        assert call["function"]["arguments"] is given
        return text

    assert arguments('{"city": "Ulm"}') == arguments({"city": "Ulm"}) == '{"city": "Ulm"}'
    assert arguments("") == arguments(None) == "{}"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_what_was_thought_is_found_under_every_name(name: str):
    template = "{{ messages[0].reasoning_content }}{{ messages[0].reasoning }}{{ messages[0].thinking }}"
    assert render(template, [{"role": "assistant", "content": "x", name: "hm"}]) == "hmhmhm"
    assert render("{{ 'thinking' in messages[0] }}") == "False"


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
        ([{"role": "assistant", "tool_calls": "f"}], "tool_calls must be a list of objects"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "must have a function"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "are not JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "[" * 100_000}}]}], "are not JSON"),
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


NAMED = {"default": "default", "tool_use": "with {{ tools[0].name }}", "rag": "{{ documents[0].title }}"}


def test_one_of_several_templates_is_chosen_by_name_or_by_need():
    tokenizer = wrap(byte_level_backend(), NAMED)
    assert tokenizer.chat_template == "default"
    assert tokenizer.apply_chat_template(CHAT) == "default"
    assert tokenizer.apply_chat_template(CHAT, tools=[]) == "default"
    assert tokenizer.apply_chat_template(CHAT, tools=[{"name": "f"}]) == "with f"
    assert tokenizer.apply_chat_template(CHAT, chat_template="rag", documents=[{"title": "Sea"}]) == "Sea"
    assert tokenizer.apply_chat_template(CHAT, chat_template="default", tools=[{"name": "f"}]) == "default"


def test_templates_without_a_default_must_be_named():
    tokenizer = wrap(byte_level_backend(), {"tool_use": "x", "rag": "y"})
    with pytest.raises(RequestError, match="none named 'default', but 'tool_use', 'rag'; pass chat_template"):
        tokenizer.apply_chat_template(CHAT)
    assert tokenizer.apply_chat_template(CHAT, chat_template="rag") == "y"


def test_the_operators_template_replaces_the_models(tmp_path: Path):
    (tmp_path / "mine.jinja").write_text("from a file: {{ messages[0].content }}")
    for setting, text in ((str(tmp_path / "mine.jinja"), "from a file: Be brief."), ("{{ 1 + 1 }}", "2"), ("rag", "")):
        tokenizer = wrap(byte_level_backend(), NAMED)
        tokenizer.use_chat_template(setting)
        assert tokenizer.apply_chat_template(CHAT, tools=[{"name": "f"}], documents=[{}]) == text


@pytest.mark.parametrize(
    ("setting", "message"),
    [("nowhere.jinja", "'nowhere.jinja' is no template and no readable file"), ("{% for %}", "line 1"), (".", "file")],
)
def test_an_operators_template_that_cannot_be_used_is_refused_at_once(setting: str, message: str):
    with pytest.raises(ValueError, match=f"^chat_template: .*{message}"):
        wrap(byte_level_backend()).use_chat_template(setting)


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
