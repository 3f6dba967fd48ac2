"""Frames between two processes that know one secret: a length, a number, a checksum and msgpack; nothing is trusted."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import zlib
from typing import Any

import msgspec

HEADER = struct.Struct("!IIQ")  # length of the payload, crc32 of number and payload, number of the frame
MAX_FRAME = 1 << 28
NONCE = 32
LEAST_SECRET = 16
SILENT_SECONDS = 12.0  # a process that says or takes nothing for so long is dead


class HostLost(ConnectionError):
    """Another process is gone, silent, or not what it should be; what the message says is one line for the operator."""


class Channel:
    """One authenticated connection. `send` may be called from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket, name: str):
        self.name = name
        self._socket = connection
        self._lock = threading.Lock()
        self._sent = self._received = 0
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SILENT_SECONDS)

    def send(self, message: Any) -> None:
        """Errors: HostLost."""
        self.send_bytes(msgspec.msgpack.encode(message))

    def send_bytes(self, payload: bytes) -> None:
        """As `send`, for a message that is encoded already."""
        with self._lock:
            self._sent += 1
            header = HEADER.pack(len(payload), _checksum(self._sent, payload), self._sent)
            try:
                self._socket.sendall(header + payload)
            except OSError as error:
                raise HostLost(f"cannot send to {self.name}: {error.strerror or error}") from None

    def receive(self) -> Any:
        """-> the next message. Errors: HostLost for a silence, an end, or a damaged frame."""
        header = read_exactly(self._socket, HEADER.size, self.name)
        length, checksum, number = HEADER.unpack(header)
        if length > MAX_FRAME:
            raise HostLost(f"{self.name} sent a frame of {length} bytes, of at most {MAX_FRAME}")
        payload = read_exactly(self._socket, length, self.name)
        self._received += 1
        if number != self._received or checksum != _checksum(number, payload):
            raise HostLost(f"{self.name} sent a damaged frame, number {number} where {self._received} was expected")
        try:
            return msgspec.msgpack.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            raise HostLost(f"{self.name} sent what is no msgpack: {error}") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def read_exactly(connection: socket.socket, count: int, name: str) -> bytes:
    """-> `count` bytes. Errors: HostLost, also after the connection's timeout."""
    found = bytearray()
    while len(found) < count:
        try:
            part = connection.recv(min(count - len(found), 1 << 20))
        except TimeoutError:
            raise HostLost(f"{name} has said nothing for {connection.gettimeout():g} s") from None
        except OSError as error:
            raise HostLost(f"the connection to {name} broke: {error.strerror or error}") from None
        if not part:
            raise HostLost(f"{name} has closed the connection")
        found += part
    return bytes(found)


def prove(connection: socket.socket, secret: bytes, role: str, number: int, timeout: float, name: str) -> int:
    """Show each other that both know the secret, without telling it. -> the peer's number.

    Each sends a nonce and its number; then HMAC-SHA256 over its role, both nonces and both numbers. Errors: HostLost.
    """
    connection.settimeout(timeout)
    mine = secrets.token_bytes(NONCE) + struct.pack("!I", number)
    try:
        connection.sendall(mine)
        theirs = read_exactly(connection, len(mine), name)
        other = {"leader": "follower", "follower": "leader"}[role]
        connection.sendall(_proof(secret, role, mine, theirs))
        shown = read_exactly(connection, hashlib.sha256().digest_size, name)
    except HostLost:
        raise
    except OSError as error:
        raise HostLost(f"no handshake with {name}: {error}") from None
    if not hmac.compare_digest(shown, _proof(secret, other, theirs, mine)):
        raise HostLost(f"{name} does not know the secret; give every process the same secret_file")
    return struct.unpack("!I", theirs[NONCE:])[0]


def read_secret(path: str) -> bytes:
    """-> the secret in a file. Errors: ValueError."""
    try:
        with open(path, "rb") as file:
            secret = file.read(1 << 16).strip()
    except OSError as error:
        raise ValueError(f"secret_file: cannot read {path}: {error.strerror}") from None
    if len(secret) < LEAST_SECRET:
        raise ValueError(f"secret_file: {path} holds {len(secret)} bytes, of at least {LEAST_SECRET}")
    return secret


def parse_address(setting: str, address: str) -> tuple[str, int]:
    """-> host and port of HOST:PORT. Errors: ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{setting}: must be HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


def _proof(secret: bytes, role: str, own: bytes, other: bytes) -> bytes:
    return hmac.digest(secret, b"quire " + role.encode() + own + other, "sha256")


def _checksum(number: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("!Q", number)))
