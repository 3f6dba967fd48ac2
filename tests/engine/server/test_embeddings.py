"""/v1/embeddings: OpenAI's client gets its vectors, in order, in both formats; what can't be served is refused."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from tests.engine.server.conftest import Server, serving

PATH = "/v1/embeddings"


def test_the_openai_client_gets_a_vector_for_each_text(server: Server):
    answer = server.openai.embeddings.create(model="fake", input=["a", "bcd"])  # it asks for base64
    first, second = (server.core.tokenizer.encode(text)[0] for text in "ab")
    assert [(item.index, item.embedding) for item in answer.data] == [(0, [1, first, 0, 1]), (1, [3, second, 0, 1])]
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("fake", 4, 4)


@pytest.mark.parametrize(
    ("given", "lengths"),
    [("abc", [3]), (["a", "bb"], [1, 2]), ([5, 6, 7], [3]), ([[5], [6, 7]], [1, 2])],
)
def test_text_and_token_ids_alone_and_in_lists(server: Server, given, lengths):
    answer = server.http.post(PATH, json={"input": given}).json()
    assert [item["embedding"][0] for item in answer["data"]] == lengths
    assert answer["object"] == "list"
    assert {item["object"] for item in answer["data"]} == {"embedding"}
    assert answer["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}


def test_both_formats_hold_the_same_numbers(server: Server):
    bodies = [{"input": "abc", "encoding_format": name} for name in ("float", "base64")]
    plain, packed = (server.http.post(PATH, json=body).json()["data"][0]["embedding"] for body in bodies)
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == plain


def test_pooling_and_normalisation_are_passed_on(server: Server):
    body = {"input": "abc", "pooling": "cls", "normalize": False, "user": "me", "dimensions": None}
    assert server.http.post(PATH, json=body).json()["data"][0]["embedding"][2:] == [2, 0]


def test_many_texts_leave_turns_to_generation(server: Server):
    assert server.http.post(PATH, json={"input": ["x" * 200] * 5}).status_code == 200
    assert server.core.embedded[-3:] == [2, 2, 1]  # 512 tokens in a step


def test_texts_wait_for_pages_and_not_forever():
    with serving(embedding_timeout=0.1) as server:
        server.core.embedded_without_room = 2
        assert server.http.post(PATH, json={"input": "abc"}).status_code == 200
        server.core.embedded_without_room = 10**6
        response = server.http.post(PATH, json={"input": "abc"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_room")
        assert server.is_serving()


def test_hidden_states_that_are_not_finite_fail_the_request_alone(server: Server):
    response = server.http.post(PATH, json={"input": "NAN"})
    assert (response.status_code, response.json()["error"]["message"]) == (
        500,
        "the model's hidden states were not finite",
    )
    assert server.is_serving()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["x", 1]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [1] * 513}, "input"),
        ({"input": "x" * 10**6}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "dimensions": 2}, "dimensions"),
        ({"input": "x", "temperature": 1}, "temperature"),
        ({"input": "x", "model": "other"}, "model"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(server: Server, body, field):
    response = server.http.post(PATH, json=body)
    assert response.status_code == (404 if field == "model" else 400)
    assert response.json()["error"]["param"] == field
    assert server.is_serving()
