"""The load generator's HTTP/1.1 client: asyncio's protocols and httptools' parser, so that a chunk costs microseconds.

All times are the event loop's (`loop.time()`), in seconds.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools


@dataclass(frozen=True)
class Url:
    """Where a server is."""

    host: str
    port: int
    path: str  # before every endpoint's, without a slash at the end
    tls: bool


def parse_url(url: str) -> Url:
    """-> the parts of http://HOST[:PORT][/PATH]. Errors: ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url: must be http://HOST:PORT or https://HOST, got {url!r}")
    tls = parts.scheme == "https"
    return Url(parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/"), tls)


class Connection(asyncio.Protocol):
    """One connection; takes one request at a time. `on_data` gets the body's pieces as they come."""

    def __init__(self):
        self.reusable = False
        self.answered = False  # whether anything of the current answer has come
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[int] | None = None
        self._on_data: Callable[[bytes], None] = lambda data: None

    async def send(self, data: bytes, on_data: Callable[[bytes], None]) -> int:
        """-> the status, when the whole answer has come. Errors: ConnectionError."""
        self.reusable = self.answered = False
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the server has closed the connection")
        self._parser = httptools.HttpResponseParser(self)
        self._done, self._on_data = asyncio.get_running_loop().create_future(), on_data
        self._transport.write(data)
        return await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not an HTTP answer: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionResetError(str(exc or "the server closed the connection before its answer had ended")))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # the parser's side

    def on_body(self, body: bytes) -> None:
        self._on_data(body)

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._parser.get_status_code())


class HttpClient:
    """Requests to one server over as many connections as are needed, which are used again."""

    def __init__(self, url: Url, headers: Mapping[str, str] | None = None):
        self.url = url
        self._idle: list[Connection] = []
        self._ssl = ssl.create_default_context() if url.tls else None
        lines = {"host": f"{url.host}:{url.port}", "content-type": "application/json", **(headers or {})}
        for name, value in lines.items():
            if any(c in name + value for c in "\r\n"):
                raise ValueError(f"header: {name!r} must be one line")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("latin-1")

    async def request(
        self, method: str, path: str, body: bytes = b"", on_data: Callable[[bytes], None] = lambda data: None
    ) -> int:
        """-> the status, when all of the body has gone to `on_data`. Errors: OSError."""
        head = f"{method} {self.url.path}{path} HTTP/1.1\r\n".encode()
        data = b"%b%bcontent-length: %d\r\n\r\n%b" % (head, self._headers, len(body), body)
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._send(connection, data, on_data)
            except ConnectionError:
                if connection.answered:
                    raise  # else the server had closed it while it was idle: take another
        return await self._send(await self._connect(), data, on_data)

    async def get(self, path: str) -> tuple[int, bytes]:
        """-> status and body. Errors: OSError."""
        pieces: list[bytes] = []
        status = await self.request("GET", path, on_data=pieces.append)
        return status, b"".join(pieces)

    async def post(self, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """-> status and body. Errors: OSError."""
        pieces: list[bytes] = []
        status = await self.request("POST", path, body, pieces.append)
        return status, b"".join(pieces)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _send(self, connection: Connection, data: bytes, on_data: Callable[[bytes], None]) -> int:
        try:
            status = await connection.send(data, on_data)
        except BaseException:  # also when this task is cancelled
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return status

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.url.host, self.url.port, ssl=self._ssl)
        return connection
