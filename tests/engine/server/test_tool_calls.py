"""Tool calls in answers, whole and in pieces, and what only looks like one."""

from __future__ import annotations

import json
import random

import pytest

from engine.server.tool_calls import PARSERS, ToolCall, ToolCallReader

ULM, EMPTY = ("weather", {"city": "Ulm </tool_call> {ü}"}), ("time", {})
JSON = [json.dumps({"name": name, "arguments": given}) for name, given in (ULM, EMPTY)]
PARAMETERS = [text.replace('"arguments"', '"parameters"') for text in JSON]
TWO = "<tool_call>{}</tool_call>\n<tool_call>{}</tool_call>\n".format(*JSON)
UNNAMED = '<tool_call>{"name": 5, "arguments": {}}</tool_call>'
LATER = '[TOOL_CALLS]weather[ARGS]{"city": "Ulm </tool_call> {ü}"}[TOOL_CALLS]time{}'
DEEP = '{"name": "f", "arguments": ' + '{"a":' * 100_000

# What a model may say -> what is told: texts, and calls as (name, arguments).
ANSWERS = [
    ("hermes", "Hello  there.\n", ["Hello  there.\n"]),
    ("hermes", f"<tool_call>\n{JSON[0]}\n</tool_call>", [ULM]),
    ("hermes", f"I look.\n\n{TWO}", ["I look.", ULM, EMPTY]),
    ("hermes", f"<tool_call>{JSON[1]}</tool_call> Done <b>.", [EMPTY, "Done <b>."]),
    ("hermes", f"<tool_call>{JSON[0]}", [ULM]),  # the model ended before the closing tag
    ("hermes", "a <tool_call>{broken}</tool_call> b", ["a <tool_call>{broken}</tool_call> b"]),
    ("hermes", UNNAMED, [UNNAMED]),
    ("hermes", '<tool_call>{"name": "f"', ['<tool_call>{"name": "f"']),
    ("hermes", f"<tool_call>{DEEP}</tool_call>", [f"<tool_call>{DEEP}</tool_call>"]),
    ("hermes", "x < y <tool", ["x < y <tool"]),
    ("llama3_json", "Hello.", ["Hello."]),
    ("llama3_json", PARAMETERS[0], [ULM]),
    ("llama3_json", f"\n<|python_tag|>{PARAMETERS[0]}; {JSON[1]}\n", [ULM, EMPTY]),
    ("llama3_json", '{"answer": 42}', ['{"answer": 42}']),
    ("llama3_json", PARAMETERS[0] + " is it", [PARAMETERS[0] + " is it"]),
    ("llama3_json", "Say " + PARAMETERS[0], ["Say " + PARAMETERS[0]]),
    ("llama3_json", "<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
    ("mistral", "Hello [TOOL] ", ["Hello [TOOL] "]),
    ("mistral", f"[TOOL_CALLS] [{JSON[0]}, {JSON[1]}]", [ULM, EMPTY]),
    ("mistral", f"Well. {LATER}", ["Well.", ULM, EMPTY]),
    ("mistral", "[TOOL_CALLS]time[CALL_ID]abc123[ARGS]{}", [EMPTY]),
    ("mistral", f"[TOOL_CALLS][{JSON[0]}, 5]", [f"[TOOL_CALLS][{JSON[0]}, 5]"]),
    ("mistral", "[TOOL_CALLS]", ["[TOOL_CALLS]"]),
]  # fmt: skip


def told(parts: list[str | ToolCall]) -> list[str | tuple[str, object]]:
    """-> the same with neighbouring texts in one, and without ids."""
    joined: list[str | tuple[str, object]] = []
    for part in parts:
        if isinstance(part, ToolCall):
            joined.append((part.name, json.loads(part.arguments)))
        elif joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize(("parser", "answer", "expected"), ANSWERS, ids=range(len(ANSWERS)))
def test_texts_and_calls_are_told_apart_whole_and_in_pieces(parser: str, answer: str, expected: list):
    assert told(ToolCallReader(parser).feed(answer, final=True)) == expected
    rng = random.Random(7)
    for _ in range(3):
        reader, parts, position = ToolCallReader(parser), [], 0
        while position < len(answer):
            size = rng.choice((1, 2, 5)) if len(answer) < 1000 else 100_000
            parts += reader.feed(answer[position : position + size], final=False)
            position += size
        assert told([*parts, *reader.feed("", final=True)]) == expected
        assert reader.num_calls == sum(isinstance(part, tuple) for part in expected)


def test_text_is_told_as_soon_as_it_can_be_no_call():
    reader = ToolCallReader("hermes")
    assert reader.feed("a <to", final=False) == ["a"]
    assert reader.feed("p> b", final=False) == [" <top> b"]
    assert reader.feed(f" <tool_call>{JSON[0]}", final=False) == []
    assert told(reader.feed("</tool_call>", final=False)) == [ULM]


def test_arguments_keep_their_characters_and_ids_differ():
    first, second = ToolCallReader("mistral").feed(f"[TOOL_CALLS][{JSON[0]},{JSON[0]}]", final=True)
    assert isinstance(first, ToolCall) and isinstance(second, ToolCall)
    assert first.arguments == '{"city": "Ulm </tool_call> {ü}"}'
    assert first.id != second.id
    assert len(first.id) == 9 and first.id.isalnum()


@pytest.mark.parametrize("parser", PARSERS)
def test_nothing_said_is_nothing_told(parser: str):
    assert ToolCallReader(parser).feed("", final=True) == []
