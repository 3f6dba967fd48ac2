"""The life of the server's process: the port opens, the model loads, requests are served, it ends with a status."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from absl import logging

from engine.server.app import Api, make_app
from engine.server.connection import GuardedProtocol
from engine.server.driver import Driver
from engine.server.errors import shutting_down
from engine.server.metrics import Metrics
from engine.server.options import ServerOptions

if TYPE_CHECKING:
    from engine.replicas import Engine


def run(core_factory: Callable[[], Engine], options: ServerOptions) -> int:
    """Serve until SIGTERM or SIGINT, or until the engine dies. -> the exit status, 0 or 1.

    `core_factory` is called in the engine's thread, after the port has opened. Threads that hang can't be ended: if
    there are any at the end, this ends the process with that status instead of returning.
    """
    _allow_open_files(options.max_connections + 256)
    try:
        listener = listen(options)
    except OSError as error:
        _say(f"cannot listen on {options.host} port {options.port}: {error.strerror or error}")
        return 1
    status = asyncio.run(_run(core_factory, options, listener))
    deadline = time.monotonic() + 1.0
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logging.flush()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
    return status


def listen(options: ServerOptions) -> socket.socket:
    """-> the listening socket. Errors: OSError."""
    family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=2048)


async def _run(core_factory: Callable[[], Engine], options: ServerOptions, listener: socket.socket) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)  # a second one changes nothing
    loop.add_signal_handler(signal.SIGINT, interrupt)  # a second Ctrl-C doesn't wait
    metrics = Metrics(options.served_model_name[0])
    driver = Driver(core_factory, options, metrics)
    return await serve(driver, metrics, options, listener, stop, hurry)


async def serve(
    driver: Driver,
    metrics: Metrics,
    options: ServerOptions,
    listener: socket.socket,
    stop: asyncio.Event,
    hurry: asyncio.Event,
) -> int:
    """Serve until `stop` is set or the engine dies; once `hurry` is set, wait for no request. -> the exit status."""
    api = Api(driver, metrics, options)
    server = _make_server(api)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    _say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, loading the model")
    driver.thread.start()
    await _first(driver.loaded, driver.ended, stop, serving)
    if driver.core is not None:
        _say("ready")
    await _first(driver.ended, stop, serving)
    if stop.is_set() and driver.failure is None:
        _say(f"stopping: running requests get {options.shutdown_timeout:g} s")
        driver.closed = True
        idle = asyncio.create_task(_until_idle(server))
        await _first(idle, hurry, driver.ended, timeout=options.shutdown_timeout)
        idle.cancel()
        driver.cancel_all(shutting_down())
    if driver.failure is not None:
        _say(f"the engine has failed: {type(driver.failure).__name__}: {driver.failure}")
        if driver.core is not None:
            await asyncio.sleep(options.death_grace)
    await _end(server, serving)
    if serving.done():
        serving.result()  # raises what ended it, if it wasn't us
    api.close()
    driver.stop()
    await _first(driver.ended, timeout=3.0 if driver.core is not None else 0.0)
    return 0 if driver.failure is None else 1


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handling: that exits only when every stream has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _make_server(api: Api) -> _Server:
    options = api.options
    config = uvicorn.Config(
        make_app(api),
        http=functools.partial(GuardedProtocol, options),  # pyright: ignore[reportArgumentType]  it makes protocols
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_level=options.uvicorn_log_level,
        timeout_keep_alive=options.timeout_keep_alive,
        timeout_graceful_shutdown=2,
        limit_concurrency=options.max_connections,
        h11_max_incomplete_event_size=options.max_header_bytes,
        server_header=False,
    )
    return _Server(config)


async def _until_idle(server: uvicorn.Server) -> None:
    while server.server_state.tasks:
        await asyncio.sleep(0.02)


async def _end(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """Let what was just answered reach its clients, then cut every connection and end the server."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await _until_idle(server)
    server.should_exit = True
    await asyncio.wait([serving], timeout=1.0)
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    await asyncio.wait([serving], timeout=3.0)


async def _first(*awaited: asyncio.Event | asyncio.Task[None], timeout: float | None = None) -> None:
    """Wait until one of them is set or done."""
    tasks = [asyncio.ensure_future(a.wait()) if isinstance(a, asyncio.Event) else a for a in awaited]
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task, given in zip(tasks, awaited, strict=True):
        if task is not given:
            task.cancel()


def _say(line: str) -> None:
    """Print one line for the operator."""
    print(f"quire: {line}", file=sys.stderr, flush=True)


def _allow_open_files(wanted: int) -> None:
    """Raise the process's soft limit, which is often 1024, as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
