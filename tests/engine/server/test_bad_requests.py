"""Bad requests: each is refused with a status and the name of the field, and the engine goes on serving."""

from __future__ import annotations

import json

import pytest

from tests.engine.server.conftest import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
DEEP = "[" * 3000 + "]" * 3000


def _deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


# What is wrong -> (path, body, the field that the error must name). A str or bytes body is sent as it is.
CASES = {
    "empty prompt": (COMPLETIONS, {"prompt": ""}, "prompt"),
    "no prompt": (COMPLETIONS, {}, "prompt"),
    "null prompt": (COMPLETIONS, {"prompt": None}, "prompt"),
    "empty list": (COMPLETIONS, {"prompt": []}, "prompt"),
    "empty inner list": (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    "one empty prompt of two": (COMPLETIONS, {"prompt": ["x", ""]}, "prompt"),
    "prompts of two kinds": (COMPLETIONS, {"prompt": ["x", 1]}, "prompt"),
    "bool for a token": (COMPLETIONS, {"prompt": [True]}, "prompt"),
    "lists too deep": (COMPLETIONS, {"prompt": [[[1]]]}, "prompt"),
    "negative token": (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    "token past the vocabulary": (COMPLETIONS, {"prompt": [[1], [10**6]]}, "prompt"),
    "token past 64 bits": (COMPLETIONS, '{"prompt": [99999999999999999999999]}', "prompt"),
    "prompt over max_model_len": (COMPLETIONS, {"prompt": [1] * 512}, "prompt"),
    "text over any max_model_len": (COMPLETIONS, {"prompt": "x" * 10**6}, "prompt"),
    "too many prompts": (COMPLETIONS, {"prompt": ["x"] * 1025}, "prompt"),
    "too many prompts with n": (COMPLETIONS, {"prompt": ["x"] * 100, "n": 100}, "prompt"),
    "n of 10^9": (COMPLETIONS, {"prompt": "x", "n": 10**9}, "n"),
    "n of 0": (COMPLETIONS, {"prompt": "x", "n": 0}, "n"),
    "true for n": (COMPLETIONS, {"prompt": "x", "n": True}, "n"),
    "string for n": (COMPLETIONS, {"prompt": "x", "n": "2"}, "n"),
    "float for n": (COMPLETIONS, {"prompt": "x", "n": 1.5}, "n"),
    "max_tokens of 0 without echo": (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    "negative max_tokens": (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, "max_tokens"),
    "min_tokens over max_tokens": (COMPLETIONS, {"prompt": "x", "max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    "500k stop strings": (COMPLETIONS, {"prompt": "x", "stop": ["s"] * 500_000}, "stop"),
    "empty stop string": (COMPLETIONS, {"prompt": "x", "stop": [""]}, "stop"),
    "number as a stop string": (COMPLETIONS, {"prompt": "x", "stop": [1]}, "stop"),
    "stop token past the vocabulary": (COMPLETIONS, {"prompt": "x", "stop_token_ids": [10**6]}, "stop_token_ids"),
    "negative stop token": (COMPLETIONS, {"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids"),
    "bias past the vocabulary": (COMPLETIONS, {"prompt": "x", "logit_bias": {"1000000": 1}}, "logit_bias"),
    "bias past 100": (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    "bias of a word": (COMPLETIONS, {"prompt": "x", "logit_bias": {"one": 1}}, "logit_bias"),
    "allowed token past the vocabulary": (
        COMPLETIONS,
        {"prompt": "x", "allowed_token_ids": [10**6]},
        "allowed_token_ids",
    ),
    "no token allowed": (COMPLETIONS, {"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
    "NaN": (COMPLETIONS, '{"prompt": "x", "temperature": NaN}', None),
    "infinity": (COMPLETIONS, '{"prompt": "x", "temperature": Infinity}', None),
    "1e400": (COMPLETIONS, '{"prompt": "x", "temperature": 1e400}', "temperature"),
    "negative temperature": (COMPLETIONS, {"prompt": "x", "temperature": -1}, "temperature"),
    "top_p of 0": (COMPLETIONS, {"prompt": "x", "top_p": 0}, "top_p"),
    "top_k of -2": (COMPLETIONS, {"prompt": "x", "top_k": -2}, "top_k"),
    "min_p over 1": (COMPLETIONS, {"prompt": "x", "min_p": 1.1}, "min_p"),
    "penalty over 2": (COMPLETIONS, {"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    "repetition_penalty of 0": (COMPLETIONS, {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    "5,000 digits": (COMPLETIONS, '{"prompt": "x", "seed": ' + "1" * 5000 + "}", "seed"),
    "logprobs of the vocabulary": (COMPLETIONS, {"prompt": "x", "logprobs": 49152}, "logprobs"),
    "prompt_logprobs of the vocabulary": (COMPLETIONS, {"prompt": "x", "prompt_logprobs": 49152}, "prompt_logprobs"),
    "streamed prompt_logprobs": (COMPLETIONS, {"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    "stream_options without stream": (COMPLETIONS, {"prompt": "x", "stream_options": {}}, "stream_options"),
    "unknown stream option": (
        COMPLETIONS,
        {"prompt": "x", "stream": True, "stream_options": {"a": 1}},
        "stream_options",
    ),
    "empty cache_salt": (COMPLETIONS, {"prompt": "x", "cache_salt": ""}, "cache_salt"),
    "unknown field": (COMPLETIONS, {"prompt": "x", "temprature": 1}, "temprature"),
    "suffix": (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
    "best_of": (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of"),
    "guided_json": (COMPLETIONS, {"prompt": "x", "guided_json": {"type": "object"}}, "guided_json"),
    "structured_outputs": (
        COMPLETIONS,
        {"prompt": "x", "structured_outputs": {"regex": "(a+)+$"}},
        "structured_outputs",
    ),
    "json_schema": (COMPLETIONS, {"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
    "beam search": (COMPLETIONS, {"prompt": "x", "use_beam_search": True}, "use_beam_search"),
    "truncation": (COMPLETIONS, {"prompt": "x", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    # Which of the two it is depends on how deep this Python lets a parser go.
    "3,000 deep": (COMPLETIONS, '{"prompt": ' + DEEP + "}", ("body", "prompt")),
    "3,000 deep in an unsupported field": (
        COMPLETIONS,
        '{"prompt": "x", "guided_json": ' + DEEP + "}",
        ("body", "guided_json"),
    ),
    "unclosed, 100,000 deep": (COMPLETIONS, '{"prompt": ' + "[" * 100_000, None),
    "not JSON": (COMPLETIONS, "prompt=x", None),
    "no body": (COMPLETIONS, "", None),
    "a list": (COMPLETIONS, "[]", None),
    "bad UTF-8": (COMPLETIONS, b'{"prompt": "\xff"}', None),
    "lone surrogate": (COMPLETIONS, '{"prompt": "a \\ud800 and more"}', None),
    "surrogate in UTF-8": (COMPLETIONS, b'{"prompt": "\xed\xa0\x80"}', None),
    "no messages": (CHAT, {}, "messages"),
    "empty messages": (CHAT, {"messages": []}, "messages"),
    "message without role": (CHAT, {"messages": [{"content": "x"}]}, "messages"),
    "unknown field of a message": (CHAT, {"messages": [{"role": "user", "content": "x", "color": 1}]}, "messages"),
    "image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    "too many messages": (CHAT, {"messages": HELLO * 5000}, "messages"),
    "tool call without JSON": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages",
    ),
    "top_logprobs without logprobs": (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    "top_logprobs of 21": (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "number for logprobs": (CHAT, {"messages": HELLO, "logprobs": 5}, "logprobs"),
    "echo of a chat": (CHAT, {"messages": HELLO, "echo": True}, "echo"),
    "template of one's own": (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
    "deep template arguments": (
        CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"a": _deep(100)}},
        "chat_template_kwargs",
    ),
    "tool without function": (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    "forced tool": (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
    "limits that contradict": (
        CHAT,
        {"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6},
        "max_completion_tokens",
    ),
    "json_object": (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
    "continued message": (CHAT, {"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
    "detokenize past the vocabulary": ("/detokenize", {"tokens": [10**6]}, "tokens"),
    "detokenize text": ("/detokenize", {"tokens": "x"}, "tokens"),
    "tokenize nothing": ("/tokenize", {}, "prompt"),
    "tokenize a number": ("/tokenize", {"prompt": 5}, "prompt"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name(server: Server, case):
    path, body, field = CASES[case]
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    response = server.http.post(path, content=content)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] in (field if isinstance(field, tuple) else (field or "body",))
    assert error["param"] in error["message"]
    assert len(error["message"]) <= 2000
    assert not server.core.groups
    assert server.is_serving()


def test_both_numbers_are_named_when_a_prompt_is_too_long(server: Server):
    message = server.complete([1] * 600).json()["error"]["message"]
    assert "600" in message
    assert "512" in message


def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenized(server: Server):
    assert "10000 characters" in server.complete("x" * 10_000).json()["error"]["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_an_unknown_model_is_not_found(server: Server, path):
    fields = {COMPLETIONS: {"prompt": "x"}, CHAT: {"messages": HELLO}, "/tokenize": {"prompt": "x"}}
    response = server.http.post(path, json={"model": "gpt-4", **fields.get(path, {"tokens": [1]})})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_the_openai_client_knows_the_errors(server: Server):
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.openai.completions.create(model="fake", prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        server.openai.completions.create(model="other", prompt="x")
    with pytest.raises(openai.APIError, match="not finite"):
        list(server.openai.completions.create(model="fake", prompt="NAN", stream=True))
