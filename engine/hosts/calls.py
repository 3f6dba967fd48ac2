"""The same calls in every process of one engine: the first does the work, and all get what came of it.

This is how a script runs on every host: each process makes each call. They meet at its beginning, where it is seen that
all make the same one; then the others do what the first one's work tells their devices, until it hands out the result.
"""

from __future__ import annotations

import atexit
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import msgspec
import numpy as np

from engine.hosts.follower import Follower
from engine.hosts.join import Peers, follow
from engine.hosts.leader import Leader
from engine.hosts.wire import HostLost
from engine.request import NoRoom, RequestError

T = TypeVar("T")
END = "the end of the program"


class Calls:
    """Calls that all processes make. Registers the last one, at which they wait for each other before they end."""

    def __init__(self, peers: Peers, execute: Callable[[str, list[np.ndarray]], Any]):
        """`execute` is given the commands of the first process's work, in the others."""
        self._peers, self._execute = peers, execute
        atexit.register(self._end)

    def call(self, name: str, arguments: Any, kind: type[T], work: Callable[[], list[T]]) -> list[T]:
        """-> what `work` makes in process 0, in every process. `kind`: what msgspec makes of each item there.

        `arguments` are compared by their `repr`. Errors: RequestError, NoRoom and ValueError of the work, in every
        process; HostLost in process 0, of a process that makes another call, too. The others end then.
        """
        self._meet(name, arguments)
        return self._made(kind) if isinstance(self._peers, Follower) else self._make(name, work)

    def _meet(self, name: str, arguments: Any) -> None:
        digest = hashlib.sha256(repr(arguments).encode("utf-8", "surrogatepass")).hexdigest()
        try:
            self._peers.compare({"its call": name, f"the arguments of {name}": digest[:16]})
        except HostLost as error:
            if isinstance(self._peers, Follower):
                self._peers.fail(error)
            raise

    def _make(self, name: str, work: Callable[[], list[T]]) -> list[T]:
        assert isinstance(self._peers, Leader)
        try:
            made = work()
        except (NoRoom, ValueError) as error:
            field = error.field if isinstance(error, RequestError) else None
            self._peers.send({"raised": [type(error).__name__, str(error), field]})
            raise
        except BaseException as error:  # nobody knows how far the devices are
            self._peers.fail(HostLost(f"{name} has ended with {type(error).__name__}"))
            raise
        for item in made:  # one by one, since a message has its limit
            self._peers.send({"item": item})
        self._peers.send({"made": len(made)})
        return made

    def _made(self, kind: type[T]) -> list[T]:
        assert isinstance(self._peers, Follower)
        items: list[T] = []
        while True:
            match follow(self._peers, self._execute):
                case {"item": item}:
                    items.append(msgspec.convert(item, kind))
                case {"made": count}:
                    assert count == len(items)
                    return items
                case {"raised": [name, text, field]}:
                    raise _error(name, text, field)
                case message:
                    self._peers.fail(HostLost(f"process 0 said {message!r:.80} in the middle of a call"))

    def _end(self) -> None:
        """Wait until every process is done with its program: the devices' connections end with the first that goes."""
        if self._peers.is_over():
            return
        try:
            self._meet(END, None)
        except HostLost:
            if isinstance(self._peers, Leader):
                self._peers.end()
            raise
        if isinstance(self._peers, Follower):
            self._peers.next()
        else:
            self._peers.close()
        jax.distributed.shutdown()


def _error(name: str, text: str, field: str | None) -> Exception:
    if field is not None:
        return RequestError(field, text.removeprefix(f"{field}: "))
    return NoRoom(text) if name == "NoRoom" else ValueError(text)
