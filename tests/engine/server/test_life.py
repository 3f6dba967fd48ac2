"""The life of the server's process: loading, signals, a dead engine, exit status."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.engine.server.conftest import events, fake_process, serving, wait_until
from tests.engine.server.fake_core import FakeCore, slow_factory

LONG = {"max_tokens": 500, "prompt": "x"}
SLOW_CORE = {"step_seconds": 0.02}


def is_refused(server, code: str) -> bool:
    """-> whether health and requests both say 503, for that reason."""
    answers = [server.http.get("/health"), server.complete(), server.http.get("/v1/models")]
    return all(a.status_code == 503 and a.json()["error"]["code"] == code for a in answers)


def test_while_it_loads_the_port_is_open_and_says_503():
    loading = threading.Event()
    with serving(slow_factory(FakeCore(), loading), ready=False) as server:
        try:
            assert is_refused(server, "loading")
            assert server.http.get("/health").headers["retry-after"]
        finally:
            loading.set()
        wait_until(server.is_ready)
        assert server.is_serving()


def test_a_model_that_cannot_be_loaded_ends_the_process_with_one_line():
    with fake_process(ready=False, load_seconds=0.2, load_error="model: no such file") as (child, _):
        assert child.wait(10) == 1
    assert "the engine has failed: ValueError: model: no such file" in "".join(child.log)
    assert "Traceback" not in "".join(child.log)


def test_sigterm_while_loading_exits_at_once():
    with fake_process(ready=False, load_seconds=30) as (child, _):
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 0


def test_sigterm_when_idle_exits_at_once():
    with fake_process() as (child, server):
        assert server.is_serving()
        with socket.create_connection(("127.0.0.1", server.port)):  # an idle connection holds nothing up
            child.send_signal(signal.SIGTERM)
            assert child.wait(5) == 0


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones():
    with fake_process(core=SLOW_CORE) as (child, server), server.stream(prompt="x", max_tokens=50) as stream:
        body = stream.iter_text()
        text = next(body)
        child.send_signal(signal.SIGTERM)
        wait_until(lambda: server.http.get("/health").status_code == 503)
        assert is_refused(server, "shutting_down")
        text += "".join(body)
        assert child.wait(5) == 0
    assert len(events(text)) == 51
    assert events(text)[-1] == "[DONE]"


@pytest.mark.parametrize("again", [False, True])
def test_past_the_deadline_running_requests_are_aborted_however_often_sigterm_comes(again):
    started = time.monotonic()
    with fake_process(core=SLOW_CORE, shutdown_timeout=1.0) as (child, server), server.stream(**LONG) as stream:
        body = stream.iter_text()
        text = next(body)
        started = time.monotonic()
        child.send_signal(signal.SIGTERM)
        if again:
            for _ in range(3):
                time.sleep(0.25)
                child.send_signal(signal.SIGTERM)
        text += "".join(body)
        assert child.wait(5) == 0
        assert 0.9 < time.monotonic() - started < 4
    *_, error, done = events(text)
    assert error["error"]["code"] == "shutting_down"
    assert done == "[DONE]"


def test_a_stream_that_nobody_reads_does_not_keep_the_process():
    options = {"core": {"max_model_len": 10**6}, "shutdown_timeout": 0.3, "stream_backlog": 10**6}
    with fake_process(**options) as (child, server), server.stream(max_tokens=10**6, prompt="x"):
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        assert child.wait(8) == 0


def test_a_second_interrupt_does_not_wait():
    with fake_process(core=SLOW_CORE) as (child, server), server.stream(**LONG) as stream:
        body = stream.iter_text()
        next(body)
        child.send_signal(signal.SIGINT)
        wait_until(lambda: server.http.get("/health").status_code == 503)
        child.send_signal(signal.SIGINT)
        assert child.wait(5) == 0
        assert events("".join(body))[-1] == "[DONE]"


def test_when_the_engine_dies_every_request_is_told_and_the_process_fails():
    with fake_process(core=SLOW_CORE) as (child, server), server.stream(**LONG) as stream:
        body = stream.iter_text()
        text = next(body)
        answer = {}
        waiting = threading.Thread(target=lambda: answer.update(whole=server.complete(**LONG)))
        waiting.start()
        time.sleep(0.2)
        with contextlib.suppress(Exception):
            server.complete("DIE")
        assert is_refused(server, "engine_failed")
        text += "".join(body)
        waiting.join()
        assert child.wait(8) == 1
    *_, error, done = events(text)
    assert error["error"]["code"] == "engine_failed"
    assert done == "[DONE]"
    assert answer["whole"].status_code == 500
    assert "the device has gone" in "".join(child.log)


def test_an_engine_that_hangs_does_not_keep_the_process():
    with fake_process(core={"step_seconds": 60}, shutdown_timeout=0.2) as (child, server), server.stream(**LONG):
        child.send_signal(signal.SIGTERM)
        assert child.wait(15) == 0


def test_a_template_that_hangs_does_not_keep_the_process():
    with fake_process(template_seconds=60, template_timeout=0.1) as (child, server):
        chat = {"messages": [{"role": "user", "content": "x"}]}
        assert server.http.post("/v1/chat/completions", json=chat).status_code == 400
        child.send_signal(signal.SIGTERM)
        assert child.wait(8) == 0


def test_a_port_in_use_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = f'{{"port": {taken.getsockname()[1]}}}'
        command = [sys.executable, "-m", "tests.engine.server.fake_server", options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert ended.stderr.startswith("quire: cannot listen on 127.0.0.1 port")
    assert len(ended.stderr.splitlines()) == 1
