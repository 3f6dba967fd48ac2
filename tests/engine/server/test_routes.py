"""The routes beside generation: models, tokenizer, health, metrics, keys."""

from __future__ import annotations

import httpx
import pytest

import engine
from tests.engine.server.conftest import Server, serving, wait_until


def test_models_are_listed_and_found(server: Server):
    (card,) = server.openai.models.list().data
    assert card.id == "fake"
    assert card.model_dump()["max_model_len"] == 512
    assert server.openai.models.retrieve("fake").id == "fake"
    assert server.http.get("/v1/models/org/other").status_code == 404


def test_every_served_name_is_known():
    with serving(served_model_name=("one", "org/two")) as server:
        assert [card.id for card in server.openai.models.list().data] == ["one", "org/two"]
        assert server.complete(model="org/two").json()["model"] == "org/two"
        assert server.complete().json()["model"] == "one"


def test_text_is_tokenized_and_back(server: Server):
    response = server.http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert response["count"] == 3
    assert response["max_model_len"] == 512
    assert response["token_strs"] == ["h", "Ã", "©"]
    assert server.http.post("/detokenize", json={"tokens": response["tokens"]}).json() == {"prompt": "hé"}


def test_a_chat_is_tokenized_as_it_would_be_prompted(server: Server):
    body = {"messages": [{"role": "user", "content": "x"}]}
    tokens = server.http.post("/tokenize", json=body).json()["tokens"]
    assert server.core.tokenizer.decode(tokens) == "<user>x<assistant>"


def test_tokenizer_info_has_what_evaluations_ask_for(server: Server):
    info = server.http.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>"
    assert info["bos_token"] == "<s>"
    assert info["pad_token"] is None
    assert "messages" in info["chat_template"]


def test_the_version_is_the_packages(server: Server):
    assert server.http.get("/version").json() == {"version": engine.__version__}


def test_the_page_needs_nothing_from_elsewhere(server: Server):
    response = server.http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405), ("DELETE", "/", 405)],
)
def test_other_routes_are_refused_in_the_same_form(server: Server, method, path, status):
    response = server.http.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


def test_a_path_that_is_not_unicode_is_not_found(server: Server):
    assert server.http.get("/%ed%a0%80%ff").status_code == 404


def test_the_prefix_cache_is_reset_only_when_idle(server: Server):
    assert server.http.post("/reset_prefix_cache").status_code == 200
    server.core.gate.clear()
    with server.stream(prompt="x"):
        server.core.gate.set()
        server.core.step_seconds = 0.05
        assert server.http.post("/reset_prefix_cache").status_code == 409
        server.core.step_seconds = 0.0


def test_metrics_count_requests_tokens_and_times():
    with serving() as server:
        server.complete(["x", "y"], max_tokens=3)
        server.complete("NAN")
        labels, own = '{model_name="fake"}', '{engine="0",model_name="fake"}'
        wait_until(lambda: f"quire:num_requests_running{own} 0.0" in server.http.get("/metrics").text)
        text = server.http.get("/metrics").text
        for line in (
            f"quire:prompt_tokens_total{own} 5.0",
            f"quire:generation_tokens_total{own} 6.0",
            f"quire:num_requests_waiting{own} 0.0",
            f"quire:kv_cache_usage_perc{own} 0.0",
            f"quire:prefix_cache_queries_total{own} 10.0",
            f"quire:prefix_cache_hits_total{own} 4.0",
            f"quire:num_preemptions_total{own} 1.0",
            f"quire:time_to_first_token_seconds_count{labels} 2.0",
            f"quire:inter_token_latency_seconds_count{labels} 4.0",
            f"quire:e2e_request_latency_seconds_count{labels} 2.0",
            f"quire:request_queue_time_seconds_count{labels} 2.0",
            f"quire:request_prefill_time_seconds_count{labels} 2.0",
            f"quire:request_decode_time_seconds_count{labels} 2.0",
            'quire:request_success_total{finished_reason="length",model_name="fake"} 2.0',
            'quire:request_success_total{finished_reason="error",model_name="fake"} 1.0',
        ):
            assert line in text.splitlines(), line
        assert "quire:iteration_tokens_total_count" in text
        assert 'block_size="16"' in text


@pytest.fixture(scope="module")
def locked():
    with serving(ready=False, api_key=("secret", "second")) as running:
        wait_until(running.is_ready)
        yield running


KEYS = ["", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "secret", "Bearer secret second"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/", "/nothing"])
def test_without_the_key_every_route_but_health_is_closed(locked: Server, key, path):
    response = locked.http.get(path, headers={"authorization": key} if key else {})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["secret", "second"])
def test_any_key_opens(locked: Server, key):
    assert locked.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert httpx.get(f"{locked.url}/health").status_code == 200


def test_a_profile_is_begun_and_ended_and_wrong_turns_are_told(server: Server):
    assert server.http.post("/stop_profile").status_code == 400
    assert server.http.post("/start_profile").status_code == 200
    assert server.core.profiling
    again = server.http.post("/start_profile")
    assert (again.status_code, again.json()["error"]["param"]) == (400, "start_profile")
    assert server.http.post("/stop_profile").status_code == 200
    assert server.is_serving()
