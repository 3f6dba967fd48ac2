"""The first process's side: it takes in every other one, tells them each step, and hears whether they are alive."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from engine.hosts.wire import Channel, HostLost, prove

JOIN_SECONDS = 300.0  # for which all processes wait for the last one
HANDSHAKE_SECONDS = 10.0
BEAT_SECONDS = 2.0
WAIT_SECONDS = 5e-5
STUCK_SECONDS = 15.0  # work on the devices that takes so long will never end
END_SECONDS = 8  # that the process gets to tell its clients, once another one is lost


class Leader:
    """Connections to the followers. What goes wrong with any of them is `failure`, and every call raises it."""

    def __init__(self, address: tuple[str, int], secret: bytes, followers: int, report: Callable[[str], None]):
        """Wait until all followers are here. Errors: HostLost, OSError."""
        self.failure: HostLost | None = None
        self._report = report
        self._channels: dict[int, Channel] = {}
        self._answers: dict[int, list[Any]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.is_ready = False
        self._work: tuple[Callable[[], bool], float] | None = None
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server(address, family=family, backlog=followers + 8) as listener:
            self._take_in(listener, secret, followers)
        for number, channel in self._channels.items():
            self._answers[number] = []
            threading.Thread(target=self._listen, args=(number, channel), daemon=True, name=f"host-{number}").start()
        threading.Thread(target=self._beat, daemon=True, name="beat").start()

    def _take_in(self, listener: socket.socket, secret: bytes, followers: int) -> None:
        deadline = time.monotonic() + JOIN_SECONDS
        while len(self._channels) < followers:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, peer = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, followers + 1)) - set(self._channels))
                raise HostLost(f"processes {missing} have not come within {JOIN_SECONDS:g} s") from None
            try:
                number = prove(connection, secret, "leader", 0, HANDSHAKE_SECONDS, f"{peer[0]}")
                if not 1 <= number <= followers or number in self._channels:
                    raise HostLost(f"{peer[0]} says that it is process {number}; give each process an id of its own")
            except HostLost as error:  # a stranger, who may be anybody: the others are still welcome
                self._report(f"refused a connection: {error}")
                connection.close()
                continue
            self._channels[number] = Channel(connection, f"process {number} ({peer[0]})")

    def compare(self, own: Mapping[str, str]) -> None:
        """Errors: HostLost that names the first entry in which a follower differs; it is told so, too."""
        for number, theirs in self.gather().items():
            difference = first_difference(own, theirs)
            if difference is not None:
                name, here, there = difference
                message = f"process {number} differs in {name}: {there}, and process 0 has {here}"
                self.send({"refused": message})
                raise self.fail(HostLost(message))
        self.send({"welcome": True})

    def agree(self, value: int) -> int:
        """-> the least of every process's value."""
        least = min(value, *self.gather().values())
        self.send(least)
        return least

    def gather(self) -> dict[int, Any]:
        """-> the next answer of every follower, by its number; waits as long as they live. Errors: HostLost."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure or all(self._answers.values()))
            self.check()
            return {number: answers.pop(0) for number, answers in self._answers.items()}

    def send(self, message: Any) -> None:
        """Tell every follower. Errors: HostLost."""
        self.check()
        payload = msgspec.msgpack.encode([message])
        try:
            for channel in self._channels.values():
                channel.send_bytes(payload)
        except HostLost as error:
            raise self.fail(error) from None

    def began(self, is_done: Callable[[], bool]) -> None:
        """The devices have got work; it must be done within STUCK_SECONDS."""
        self._work = is_done, time.monotonic()

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Wait for the devices. Errors: HostLost."""
        while not is_done():
            self.check()
            time.sleep(WAIT_SECONDS)

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def is_over(self) -> bool:
        """-> whether the followers have been let go, or something has failed."""
        return self._closed or self.failure is not None

    def close(self) -> None:
        """Let the followers end: with status 0 if they have once been ready, and nothing has failed."""
        if not self._closed and self.failure is None and self.is_ready:
            self._closed = True
            for channel in self._channels.values():
                with contextlib.suppress(HostLost):  # it has ended already
                    channel.send({"bye": True})
        for channel in self._channels.values():
            channel.close()

    def _listen(self, number: int, channel: Channel) -> None:
        try:
            while True:
                message = channel.receive()
                if isinstance(message, list) and len(message) == 1:
                    with self._changed:
                        self._answers[number].append(message[0])
                        self._changed.notify_all()
        except HostLost as error:
            if not self._closed:
                self.fail(error)

    def _beat(self) -> None:
        while self.failure is None and not self._closed:
            for channel in self._channels.values():
                try:
                    channel.send(None)
                except HostLost as error:
                    if not self._closed:
                        self.fail(error)
            if self._work is not None and time.monotonic() - self._work[1] > STUCK_SECONDS and not self._work[0]():
                self.fail(HostLost(f"a step has not ended within {STUCK_SECONDS:g} s"))
            time.sleep(BEAT_SECONDS)

    def fail(self, error: HostLost) -> HostLost:
        """-> the first failure, which is the one to tell of. The followers learn of it by the end of the connection."""
        with self._changed:
            if self.failure is None:
                self.failure = error
                self._changed.notify_all()
                ending = threading.Timer(END_SECONDS, self.end)
                ending.daemon = True
                ending.start()
        for channel in self._channels.values():
            channel.close()
        return self.failure

    def end(self) -> None:
        """End a process that does not end by itself: a thread of it may be waiting for devices that are lost."""
        self._report(f"process 0 ends: {self.failure}")
        os._exit(1)


def first_difference(own: Mapping[str, str], theirs: Any) -> tuple[str, str, str] | None:
    """-> name, own and other value of the first entry that differs."""
    other: Mapping[str, Any] = theirs if isinstance(theirs, dict) else {}
    names: Sequence[str] = [*own, *(name for name in other if name not in own)]
    for name in names:
        if own.get(name) != other.get(name):
            return str(name), str(own.get(name)), str(other.get(name))
    return None
