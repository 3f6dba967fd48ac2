"""/v1/completions, through a real connection."""

from __future__ import annotations

import pytest

from tests.engine.server.conftest import Server, events


def test_the_openai_client_gets_text_and_usage(server: Server):
    answer = server.openai.completions.create(model="fake", prompt="hello", max_tokens=5)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == "abcde"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == 10
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_the_model_may_be_left_out(server: Server):
    assert server.complete().json()["model"] == "fake"


def test_max_tokens_defaults_to_16(server: Server):
    assert server.complete().json()["usage"]["completion_tokens"] == 16


def test_a_stop_string_is_named(server: Server):
    choice = server.complete(stop=["c"]).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "c")


def test_a_batch_with_n_comes_back_in_order(server: Server):
    answer = server.openai.completions.create(model="fake", prompt=["x", "y"], n=2, max_tokens=2)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "ab"), (1, "bc"), (2, "ab"), (3, "bc")]
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize(("prompt", "groups"), [([1, 2, 3], [[1, 2, 3]]), ([[1, 2], [3]], [[1, 2], [3]])])
def test_prompts_of_token_ids_are_taken_as_they_are(server: Server, prompt, groups):
    before = len(server.core.prepared)
    server.complete(prompt)
    assert [group.prompt_token_ids for group in server.core.prepared[before:]] == groups


def test_every_sampling_parameter_reaches_the_engine(server: Server):
    fields = {
        "n": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "temperature": 0.75,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.125,
        "seed": 11,
        "stop": ["z"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "max_tokens": 4,
        "min_tokens": 2,
        "prompt_logprobs": 1,
        "logprobs": 2,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "logit_bias": {"5": -1.5},
        "allowed_token_ids": [1, 2],
        "bad_words": ["no"],
    }
    assert server.complete(**fields).status_code == 200
    params = server.core.prepared[-1].params
    expected = {**fields, "logit_bias": {5: -1.5}}
    for name, value in expected.items():
        got = getattr(params, name)
        assert (list(got) if isinstance(got, tuple) else got) == value, name


def test_priority_needs_the_policy(server: Server):
    refused = server.complete(priority=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    assert server.complete(priority=0, cache_salt="mine").status_code == 200
    assert server.core.prepared[-1].cache_salt == "mine"


def test_special_tokens_are_left_out_when_asked(server: Server):
    server.complete("<s>x", add_special_tokens=False)
    assert server.core.prepared[-1].prompt_token_ids == server.core.tokenizer.encode("<s>x", add_special_tokens=False)


def test_logprobs_are_parallel_lists(server: Server):
    answer = server.openai.completions.create(model="fake", prompt="x", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["a", "b", "c"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[0] == {"a": -0.5, "b": -2.0, "c": -3.0}


def test_echo_with_logprobs_is_what_evaluations_read(server: Server):
    body = {
        "prompt": server.core.tokenizer.encode("hey"),
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
    }
    choice = server.complete(**body, seed=1234).json()["choices"][0]
    assert choice["text"] == "heya"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "e", "y", "a"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    for token, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert token == max(top.values())
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert "prompt_logprobs" not in choice


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_max_tokens_0_gives_only_the_prompt(server: Server, stream):
    response = server.complete("hey", max_tokens=0, logprobs=1, echo=True, stream=stream)
    choice = (events(response.text)[0] if stream else response.json())["choices"][0]
    assert choice["text"] == "hey"
    assert choice["logprobs"]["tokens"] == ["h", "e", "y"]
    assert choice["finish_reason"] == "length"
    if not stream:
        assert response.json()["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_come_in_vllms_form(server: Server):
    choice = server.complete("hey", prompt_logprobs=1).json()["choices"][0]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    e = str(server.core.tokenizer.encode("e")[0])
    assert second[e] == {"logprob": -0.5, "rank": 1, "decoded_token": "e"}
    assert len(second) == len(third) == 2


def test_logprobs_that_json_lacks_are_clamped(server: Server):
    choice = server.complete("INF", max_tokens=2, logprobs=1, prompt_logprobs=1).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0, -9999.0]
    assert set(choice["logprobs"]["top_logprobs"][0].values()) == {-9999.0}
    assert {entry["logprob"] for entry in choice["prompt_logprobs"][1].values()} == {-9999.0}


def test_a_stream_says_the_same_as_the_whole(server: Server):
    stream = server.openai.completions.create(
        model="fake",
        prompt=["x", "y"],
        n=2,
        max_tokens=4,
        logprobs=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, offsets, reasons = [""] * 4, [[], [], [], []], [None] * 4
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset
            reasons[choice.index] = reasons[choice.index] or choice.finish_reason
    assert texts == ["abcd", "bcde"] * 2
    assert offsets == [[0, 1, 2, 3]] * 4
    assert reasons == ["length"] * 4
    assert chunk.choices == []
    assert chunk.usage.completion_tokens == 16
    assert chunk.usage.prompt_tokens_details.cached_tokens == 4


def test_a_stream_ends_with_done_and_has_usage_only_when_asked(server: Server):
    *chunks, done = events(server.complete(stream=True, max_tokens=3).text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", "c"]
    assert not any("usage" in chunk for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events(server.complete(stream=True, max_tokens=3, stream_options=options).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


def test_a_streamed_echo_begins_with_the_prompt(server: Server):
    first, second, *_ = events(server.complete("hey", stream=True, echo=True, logprobs=0, max_tokens=2).text)
    assert first["choices"][0]["text"] == "heya"
    assert first["choices"][0]["logprobs"]["tokens"] == ["h", "e", "y", "a"]
    assert second["choices"][0]["logprobs"]["text_offset"] == [4]


def test_a_request_whose_logits_are_nan_fails_alone(server: Server):
    failed = server.complete(["x", "NAN"])
    assert failed.status_code == 500
    assert "not finite" in failed.json()["error"]["message"]
    assert server.is_serving()


def test_an_error_in_a_stream_is_an_event_before_done(server: Server):
    error, done = events(server.complete("NAN", stream=True).text)
    assert "not finite" in error["error"]["message"]
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_what_can_never_fit_is_refused_with_its_status(server: Server, stream):
    refused = server.complete(["x", "NOFIT"], stream=stream)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"
    assert server.is_serving()
    assert not server.core.groups


def test_fields_that_ask_for_nothing_are_let_through(server: Server):
    neutral = {"best_of": 1, "suffix": None, "user": "me", "use_beam_search": False, "guided_json": None, "store": True}
    assert server.complete(**neutral, metadata={"a": "b"}, response_format={"type": "text"}).status_code == 200
