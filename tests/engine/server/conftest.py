"""Servers for tests: the real application in a thread, where a test sees the core too, or in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from engine.server import ServerOptions
from engine.server.driver import Driver
from engine.server.metrics import Metrics
from engine.server.run import listen, serve
from tests.engine.server.fake_core import FakeCore


class Server:
    """A server under test, and clients for it."""

    def __init__(self, port: int, core: Any = None):
        self.port = port
        self.core: FakeCore = core
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, **fields})

    def stream(self, path: str = "/v1/completions", **fields: Any) -> Any:
        """-> a context with the response; its body is not read."""
        return self.http.stream("POST", path, json={"stream": True, **fields})

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/health").status_code == 200
        return False

    def is_serving(self) -> bool:
        """-> whether a request is answered as it should be."""
        return self.complete(max_tokens=3).json()["choices"][0]["text"] == "abc"

    def close(self) -> None:
        self.http.close()
        self.openai.close()


def events(text: str) -> list[Any]:
    """-> what a stream said: JSON of each event, and the string [DONE]."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in data]


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(core_factory: Callable[[], FakeCore] = FakeCore, *, ready: bool = True, **options: Any) -> Iterator[Server]:
    """The application in a thread. It must end with status 0, unless its core failed."""
    settings = {"served_model_name": ("fake",), "host": "127.0.0.1", "port": 0, "uvicorn_log_level": "warning"}
    server_options = ServerOptions(**{**settings, **options})
    listener = listen(server_options)
    state: dict[str, Any] = {}

    async def main() -> None:
        metrics = Metrics("fake")
        state["driver"] = Driver(core_factory, server_options, metrics)
        state["loop"], state["stop"], state["hurry"] = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        state["status"] = await serve(state["driver"], metrics, server_options, listener, state["stop"], state["hurry"])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    server = Server(listener.getsockname()[1])
    try:
        if ready:
            wait_until(server.is_ready)
            server.core = state["driver"].core
        yield server
    finally:
        server.close()
        if server.core is not None:
            server.core.gate.set()
        if thread.is_alive():
            state["loop"].call_soon_threadsafe(lambda: (state["stop"].set(), state["hurry"].set()))
        thread.join(timeout=20)
    assert not thread.is_alive(), "the server hangs"
    assert state["status"] == (0 if state["driver"].failure is None else 1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A ready server, shared by a module's tests; each leaves it as it was."""
    with serving() as running:
        yield running


@contextlib.contextmanager
def process(*command: str) -> Iterator[tuple[subprocess.Popen[str], Server]]:
    """A server process, once its port is open."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        lines: list[str] = []
        child.log = lines  # type: ignore[attr-defined]
        reader = threading.Thread(target=lambda: lines.extend(iter(child.stderr.readline, "")))  # type: ignore
        reader.start()
        server = None
        try:
            wait_until(lambda: child.poll() is not None or any("listening on" in line for line in list(lines)), 60)
            found = re.search(r"listening on http://[^ ]*:(\d+)", "".join(lines))
            assert found, "".join(lines)
            server = Server(int(found[1]))
            yield child, server
        finally:
            if server is not None:
                server.close()
            child.kill()
            reader.join()


@contextlib.contextmanager
def fake_process(*, ready: bool = True, **options: Any) -> Iterator[tuple[subprocess.Popen[str], Server]]:
    """A server process around a fake core."""
    settings = {"port": 0, "uvicorn_log_level": "warning", **options}
    with process(sys.executable, "-m", "tests.engine.server.fake_server", json.dumps(settings)) as (child, server):
        if ready:
            wait_until(server.is_ready)
        yield child, server
