"""Every other process's side: it joins the leader, and does as told until it is let go or the leader is lost."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from engine.hosts.leader import BEAT_SECONDS, HANDSHAKE_SECONDS, JOIN_SECONDS
from engine.hosts.wire import Channel, HostLost, prove


class Follower:
    """A connection to the leader. `on_loss` is called, maybe in a thread of its own, as soon as all is lost."""

    def __init__(self, address: tuple[str, int], secret: bytes, number: int, on_loss: Callable[[Exception], None]):
        """Connect, as soon as the leader listens. Errors: HostLost."""
        self._channel = Channel(_connect(address, secret, number), "process 0")
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._on_loss = on_loss
        self._ended = False
        self.is_ready = False
        threading.Thread(target=self._listen, daemon=True, name="leader").start()
        threading.Thread(target=self._beat, daemon=True, name="beat").start()

    def compare(self, own: Mapping[str, str]) -> None:
        """Tell the leader what we run. Errors: HostLost if it refuses."""
        self.answer(dict(own))
        message = self.next()
        match message:
            case {"welcome": True}:
                return
            case {"refused": why}:
                raise HostLost(str(why))
            case None:
                raise HostLost("process 0 has ended")
            case _:
                raise HostLost(f"process 0 said {message!r:.80}, and not whether we are welcome")

    def agree(self, value: int) -> int:
        """-> the least of every process's value."""
        self.answer(value)
        return int(self.next())

    def answer(self, message: Any) -> None:
        self._channel.send([message])

    def next(self) -> Any:
        """-> what the leader says next; None when it lets us go."""
        message = self._messages.get()
        return None if isinstance(message, dict) and "bye" in message else message

    def fail(self, error: Exception) -> None:
        """We cannot go on: to the leader this is the end of the connection."""
        self._on_loss(error)

    def is_over(self) -> bool:
        """-> whether the leader has let us go, or refused us."""
        return self._ended

    def _listen(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if isinstance(message, dict) and "bye" in message:
                    self._ended = True
                    self._messages.put(message)
                    return
                if isinstance(message, list) and len(message) == 1:
                    self._ended = isinstance(message[0], dict) and "refused" in message[0]
                    self._messages.put(message[0])
        except HostLost as error:
            if not self._ended:
                self._on_loss(error)
        finally:
            self._channel.close()

    def _beat(self) -> None:
        while not self._ended:
            try:
                self._channel.send(None)
            except HostLost as error:
                if not self._ended:
                    self._on_loss(error)
                return
            time.sleep(BEAT_SECONDS)


def _connect(address: tuple[str, int], secret: bytes, number: int) -> socket.socket:
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            connection = socket.create_connection(address, HANDSHAKE_SECONDS)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostLost(f"process 0 does not listen at {address[0]}:{address[1]}: {error}") from None
            time.sleep(0.1)
    try:
        prove(connection, secret, "follower", number, HANDSHAKE_SECONDS, "process 0")
    except HostLost:
        connection.close()
        raise
    return connection
