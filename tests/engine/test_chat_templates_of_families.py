"""Chats through templates that ask for what those of the supported families ask for, each in a few lines."""

from __future__ import annotations

from typing import Any

import pytest

from engine.request import RequestError
from tests.engine.tokenizers_for_tests import byte_level_backend, wrap

QWEN = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

LLAMA3 = """{{ bos_token }}{% for message in messages %}
{{- '<|start_header_id|>' + ('ipython' if message['role'] == 'tool' else message['role']) + '<|end_header_id|>\\n\\n' }}
{%- if loop.first and message['role'] == 'system' %}Today: {{ strftime_now('%Y')[:2] }}xx {% endif %}
{{- message['content'] | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if message.role == 'user' %}[INST] {{ message.content }}[/INST]
    {%- else %} {{ message.content }}{{ eos_token }}{% endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set first, rest = messages[0].content, messages[1:] %}
{%- else %}{% set first, rest = '', messages %}{% endif %}
{%- for message in rest %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ first ~ '\\n\\n' if loop.first and first else '' }}{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

HARMONY = """{%- macro channel(name, text) %}<|start|>assistant<|channel|>{{ name }}<|message|>{{ text }}{% endmacro %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if 'thinking' in message %}{{ channel('analysis', message.thinking) }}<|end|>{% endif %}
        {{- channel('final', message.content) }}<|return|>
    {%- else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""

S, U = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b> "}
A = {"role": "assistant", "content": "Yes."}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
TOOL = {"type": "function", "function": {"name": "f"}}

CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "qwen": (
        QWEN,
        [U],
        {"enable_thinking": False},
        "<|im_start|>user\nHi <b> <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "qwen with tools": (
        QWEN,
        [U, {**A, "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "7"}],
        {"tools": [TOOL]},
        (
            '<|im_start|>system\n{"type": "function", "function": {"name": "f"}}\n<|im_end|>\n'
            "<|im_start|>user\nHi <b> <|im_end|>\n<|im_start|>assistant\n\n"
            '<tool_call>{"name": "f", "arguments": {"x": "é"}}</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>7</tool_response><|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    "llama 3": (
        LLAMA3,
        [S, U],
        {},
        (
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 20xx Be brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi <b><|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "mistral": (MISTRAL, [S, U, A, U], {}, "<s>[INST] Hi <b> [/INST] Yes.</s>[INST] Hi <b> [/INST]"),
    "gemma": (
        GEMMA,
        [S, U, A],
        {"add_generation_prompt": False},
        "<s><start_of_turn>user\nBe brief.\n\nHi <b><end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n",
    ),
    "gpt-oss": (
        HARMONY,
        [U, {**A, "reasoning_content": "Hm."}],
        {},
        (
            "<|start|>user<|message|>Hi <b> <|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Yes.<|return|><|start|>assistant"
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_chat_reads_as_the_family_writes_it(case: str):
    template, messages, options, prompt = CASES[case]
    assert wrap(byte_level_backend(), template).apply_chat_template(messages, **options) == prompt


def test_a_chat_that_the_family_does_not_take_is_refused_in_its_words():
    with pytest.raises(RequestError, match="user and assistant must take turns"):
        wrap(byte_level_backend(), MISTRAL).apply_chat_template([U, U])
