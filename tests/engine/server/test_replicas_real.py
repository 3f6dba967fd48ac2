"""A server with two replicas of a real model: both work, /metrics tells them apart, and they end together."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from subprocess import Popen
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.engine.server.conftest import Server, events, process, wait_until
from tests.engine.server.replicas_server import BROKEN

# Without a tokenizer there is no text, and log-probabilities name the tokens.
LONG: dict[str, Any] = {"max_tokens": 100, "temperature": 0, "ignore_eos": True, "logprobs": 0}
SHORT = LONG | {"max_tokens": 8}
ENDLESS = LONG | {"max_tokens": 250}  # 2.5 s at least: nobody waits for its end


@contextmanager
def replicas() -> Iterator[tuple[Popen[str], Server]]:
    with process(sys.executable, "-m", "tests.engine.server.replicas_server") as (child, server):
        wait_until(lambda: child.poll() is not None or server.is_ready(), 60)
        yield child, server


def of_each(server: Server, name: str) -> list[float]:
    """-> a metric's value for each replica."""
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    found = {s.labels["engine"]: s.value for family in families for s in family.samples if s.name == f"quire:{name}"}
    return [found[number] for number in sorted(found)]


def tokens(server: Server, prompt: list[int]) -> list[str]:
    return server.complete(prompt, **SHORT).json()["choices"][0]["logprobs"]["tokens"]


def test_requests_are_spread_and_aborted_and_those_that_run_may_finish():
    with replicas() as (child, server):
        prompts = [[i + 1, 2, 3] for i in range(8)]
        alone = [tokens(server, prompt) for prompt in prompts]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda prompt: tokens(server, prompt), prompts)) == alone
        done = of_each(server, "generation_tokens_total")
        assert len(done) == 2
        assert sum(done) == 2 * 8 * 8
        assert min(done) > 8

        with server.stream(prompt=[1, 2], **ENDLESS) as one, server.stream(prompt=[3, 4], **ENDLESS) as other:
            texts = one.iter_text(), other.iter_text()  # to be kept: a client that forgets them hangs up
            assert all(map(next, texts))
            assert of_each(server, "num_requests_running") == [1, 1]
        wait_until(lambda: of_each(server, "num_requests_running") == [0, 0])  # their clients have gone
        assert of_each(server, "kv_cache_usage_perc") == [0, 0]

        with server.stream(prompt=[1, 2], **LONG) as one, server.stream(prompt=[3, 4], **LONG) as other:
            texts = one.iter_text(), other.iter_text()
            said = [next(text) for text in texts]
            child.send_signal(signal.SIGTERM)
            for begun, rest in zip(said, texts, strict=True):
                *_, last, done = events(begun + "".join(rest))
                assert done == "[DONE]"
                assert last["choices"][0]["finish_reason"] == "length"
        assert child.wait(10) == 0, "".join(child.log)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_replica_that_fails_ends_all_and_is_named():
    with replicas() as (child, server), server.stream(prompt=[1, 2], **LONG) as stream:
        body = stream.iter_text()
        text = next(body)
        assert server.complete(BROKEN, **SHORT).json()["error"]["code"] == "engine_failed"  # of the other replica
        *_, error, done = events(text + "".join(body))
        assert (error["error"]["code"], done) == ("engine_failed", "[DONE]")
        assert child.wait(10) == 1
        log = "".join(child.log)  # pyright: ignore[reportAttributeAccessIssue]
    assert "the engine has failed: ReplicaFailed: replica 1 of 2: JaxRuntimeError: INTERNAL: the device has gone" in log
