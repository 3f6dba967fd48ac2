"""One TCP connection: limits that uvicorn lacks, the capped body, and the watch for a client that goes away."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any

import h11
from starlette.requests import Request
from starlette.types import Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.server.errors import ApiError
from engine.server.options import MIB, ServerOptions

SPARE_CONNECTIONS = 64  # above max_connections, which are told 503; whoever comes after them is cut


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, where nobody can hold a connection by sending or reading too slowly.

    A handler finds `drop` in its scope's state as `drop_connection`.
    """

    def __init__(self, options: ServerOptions, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.options = options
        self.read_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.app_state = {**self.app_state, "drop_connection": self.drop}
        super().connection_made(transport)
        if len(self.connections) > self.options.max_connections + SPARE_CONNECTIONS:
            self.drop()
        else:
            self._watch_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.read_timer = _cancel(self.read_timer)
        self.write_timer = _cancel(self.write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_timer = self.loop.call_later(self.options.write_timeout, self.drop)

    def resume_writing(self) -> None:
        self.write_timer = _cancel(self.write_timer)
        super().resume_writing()

    def drop(self) -> None:
        """Close the connection and discard what is unsent, in the kernel too."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _watch_reading(self) -> None:
        """Limit the time for headers, and for the rest of a body whose answer is already given.

        A body that a handler reads has its own limit (`read_body`); uvicorn limits the time between two requests.
        """
        answered = self.cycle is not None and self.cycle.response_complete
        waiting = self.conn.their_state is h11.IDLE or (self.conn.their_state is h11.SEND_BODY and answered)
        if not waiting:
            self.read_timer = _cancel(self.read_timer)
        elif self.read_timer is None:
            self.read_timer = self.loop.call_later(self.options.header_timeout, self.drop)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class BodyReader:
    """Reads request bodies, a few large ones at a time: many half-sent ones together would fill the memory."""

    def __init__(self, options: ServerOptions):
        self.options = options
        self._large = asyncio.Semaphore(8)

    async def read(self, request: Request) -> bytes:
        """-> the body. Errors: ApiError 413 past max_body_bytes, 408 past body_timeout."""
        most = self.options.max_body_bytes
        length = request.headers.get("content-length", "")
        if length.isdigit() and len(length) < 20 and int(length) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self.options.body_timeout):
                return await self._collect(request, most)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.options.body_timeout:g} s") from None

    async def _collect(self, request: Request, most: int) -> bytes:
        body = bytearray()
        has_slot = False
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise _too_large(most)
                if len(body) > MIB and not has_slot:
                    await self._large.acquire()
                    has_slot = True
        finally:
            if has_slot:
                self._large.release()
        return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes, the most that is taken", code="body_too_large")


async def watch_for_disconnect(receive: Receive, on_gone: Callable[[], None]) -> None:
    """Call `on_gone` when the client goes away; ends then. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    on_gone()
