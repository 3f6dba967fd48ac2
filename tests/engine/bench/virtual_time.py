"""An event loop whose clock stands still while there is work and jumps to the next timer when there is none.

Connections are socket pairs within the loop, whose data is there as soon as it is sent: what takes place, and when,
does not depend on the machine.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import Callable, Coroutine
from typing import Any


class _Selector(selectors.DefaultSelector):
    """Never waits: it moves the clock instead."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events and timeout is None:
            raise RuntimeError("nothing will ever happen: everybody waits")
        if not events and timeout:
            self.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """`server` makes a protocol for the other end of each connection."""

    def __init__(self, server: Callable[[], asyncio.BaseProtocol]):
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self._server = server

    def time(self) -> float:
        return self._virtual.now

    async def create_connection(self, protocol_factory: Any, *address: Any, **options: Any) -> Any:
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        await self.connect_accepted_socket(self._server, far)
        return await super().create_connection(protocol_factory, sock=near)


def run(server: Callable[[], asyncio.BaseProtocol], main: Coroutine[Any, Any, Any]) -> Any:
    """-> what `main` returns, in a loop of its own."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(server)) as runner:
        return runner.run(main)
