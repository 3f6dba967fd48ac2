"""Connections: clients that leave, send or read too slowly or too much, and a queue that is full."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator

import pytest

from engine.server.options import MIB
from tests.engine.server.conftest import Server, events, serving, wait_until
from tests.engine.server.fake_core import FakeCore


@contextlib.contextmanager
def connection(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        yield sock


def post(sock: socket.socket, path: str = "/v1/completions", **body) -> None:
    data = json.dumps({"prompt": "x", **body}).encode()
    sock.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)


def is_closed_by_server(sock: socket.socket, seconds: float) -> bool:
    """-> whether the server ends the connection in that time; what it sends before is thrown away."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            if select.select([sock], [], [], 0.05)[0] and not sock.recv(1 << 16):
                return True
        return False
    return True


def is_reset_by_server(sock: socket.socket, seconds: float) -> bool:
    """-> whether the server resets the connection in that time; nothing is read."""
    poll = select.poll()
    poll.register(sock, 0)  # errors and hang-ups are always reported
    return bool(poll.poll(seconds * 1000))


def send_all_it_takes(sock: socket.socket, data: bytes, times: int) -> int:
    """-> bytes that could be sent before the server cut the connection."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        for _ in range(times):
            sock.sendall(data)
            sent += len(data)
    return sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_a_client_that_leaves_is_aborted_by_the_next_step(stream, queued):
    with serving(lambda: FakeCore(step_seconds=0.01, max_num_seqs=1)) as server, contextlib.ExitStack() as stack:
        if queued:
            post(stack.enter_context(connection(server)), max_tokens=500)
            wait_until(lambda: len(server.core.added) == 1)
        with connection(server) as sock:
            post(sock, stream=stream, max_tokens=500)
            wait_until(lambda: len(server.core.added) == 1 + queued)
            if stream and not queued:
                assert b"data: " in sock.recv(4096) + sock.recv(4096)
        wait_until(lambda: server.core.aborted == server.core.added[-1:], 2)
        assert len(server.core.groups) == queued


def test_a_client_that_leaves_while_its_batch_runs_takes_all_of_it_along():
    with serving(lambda: FakeCore(step_seconds=0.01)) as server:
        with connection(server) as sock:
            post(sock, prompt=["x", "y", "z"], n=2, max_tokens=500)
            wait_until(lambda: len(server.core.added) == 3)
        wait_until(lambda: server.core.aborted == server.core.added, 2)


def test_a_slow_reader_is_aborted_and_others_go_on():
    def core() -> FakeCore:
        return FakeCore(max_model_len=10**6)

    with serving(core, stream_backlog=50, uvicorn_log_level="critical") as server, connection(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        post(sock, stream=True, max_tokens=10**6)
        sock.recv(100)
        wait_until(lambda: server.core.aborted)
        assert server.is_serving()
        assert is_reset_by_server(sock, 5)


def test_a_client_that_reads_nothing_is_cut_after_a_while():
    options = {"write_timeout": 0.3, "stream_backlog": 10**9}
    with serving(lambda: FakeCore(max_model_len=10**6), **options) as server, connection(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        post(sock, stream=True, max_tokens=10**6)
        assert is_reset_by_server(sock, 15)
        wait_until(lambda: server.core.aborted)
        assert server.is_serving()


def test_40_mb_of_body_are_refused(server: Server):
    response = server.http.post("/v1/completions", content=b'{"prompt": "' + b"x" * (40 * MIB))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert server.is_serving()


def test_a_body_without_a_length_is_refused_when_it_grows_too_large(server: Server):
    response = server.http.post("/v1/completions", content=(b"x" * MIB for _ in range(40)))
    assert response.status_code == 413
    assert server.is_serving()


def test_a_refused_body_is_not_read_for_ever():
    with serving(header_timeout=0.3) as server, connection(server) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert b"413" in sock.recv(1000)
        started = time.monotonic()
        assert send_all_it_takes(sock, b"x" * MIB, 100_000) < 99999999999
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("header", [b"a: " + b"x" * MIB, b"a: b\r\n" * 10_000])
def test_64_mb_of_headers_are_cut(server: Server, header):
    with connection(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        assert send_all_it_takes(sock, header, 64 * MIB // len(header)) < 16 * MIB
    assert server.is_serving()


def test_slow_headers_and_silent_connections_are_timed_out():
    with serving(header_timeout=0.4) as server, connection(server) as silent, connection(server) as slow:
        with connection(server) as second:
            second.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200" in second.recv(1000)
            second.sendall(b"GET /hea")  # slow from the second request on
            slow.sendall(b"GET /health HTTP/1.1\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(20):
                    time.sleep(0.05)
                    slow.sendall(b"a: b\r\n")
            for sock in (silent, slow, second):
                assert is_closed_by_server(sock, 1)
        assert server.is_serving()


def test_a_slow_body_is_timed_out():
    with serving(body_timeout=0.3) as server, connection(server) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert b"408" in sock.recv(1000)


def test_long_answers_outlive_the_limits_for_sending():
    with serving(lambda: FakeCore(step_seconds=0.05), header_timeout=0.2, timeout_keep_alive=1) as server:
        assert server.complete(max_tokens=15).json()["usage"]["completion_tokens"] == 15
        assert len(events(server.complete(max_tokens=15, stream=True).text)) == 16


def test_connections_are_capped():
    with serving(max_connections=4) as server, contextlib.ExitStack() as stack:
        first = [stack.enter_context(connection(server)) for _ in range(8)]
        first[-1].sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"503" in first[-1].recv(1000)
        last = first[-1]
        try:
            for _ in range(100):
                last = stack.enter_context(connection(server))
            assert is_closed_by_server(last, 5)
        except ConnectionResetError:
            pass  # closed even before connecting had returned
        stack.close()
        wait_until(server.is_ready)


def test_a_full_queue_answers_429_all_or_nothing():
    with serving(lambda: FakeCore(max_num_seqs=2), max_queue=3) as server, contextlib.ExitStack() as stack:
        server.core.gate.clear()
        first = stack.enter_context(connection(server))
        post(first, n=3)  # n counts n: 3 of 5 places are taken
        wait_until(lambda: len(server.core.prepared) == 1)
        for refused in (server.complete(["x"] * 3), server.complete(n=3), server.complete(n=3, stream=True)):
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "queue_full"
        post(stack.enter_context(connection(server)), prompt=["x", "y"])
        wait_until(lambda: len(server.core.prepared) == 1 + 3 + 1 + 1 + 2)
        assert server.complete().status_code == 429
        server.core.gate.set()
        wait_until(lambda: not server.core.groups)
        assert len(server.core.added) == 3
        assert server.is_serving()


def test_prompt_tokens_count_against_the_queue_until_they_are_processed():
    with serving(lambda: FakeCore(max_num_seqs=1), max_queue_tokens=100) as server, connection(server) as sock:
        server.core.gate.clear()
        post(sock, prompt="x" * 90)
        wait_until(lambda: server.core.prepared)
        assert server.complete("y" * 20).status_code == 429
        assert server.complete(["y"] * 6, n=2).status_code == 429
        server.core.gate.set()
        wait_until(lambda: not server.core.groups)
        assert server.complete("y" * 200).status_code == 200  # an empty queue takes what is larger than itself


def test_places_in_the_queue_come_back():
    with serving(lambda: FakeCore(max_num_seqs=1, step_seconds=0.005), max_queue=1) as server:
        for kind in ({"max_tokens": 2}, {"prompt": "NAN"}, {"prompt": "NOFIT"}, {"stream": True, "n": 2}):
            for _ in range(3):
                assert server.complete(**{"n": 2, **kind}).status_code != 429
        for _ in range(3):
            with connection(server) as sock:
                post(sock, n=2, max_tokens=500)
                wait_until(lambda: server.core.groups)
            wait_until(lambda: not server.core.groups)
        assert server.complete(n=2).status_code == 200
