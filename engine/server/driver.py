"""The engine's thread, and what the event loop knows of it: requests go in one by one, updates come out once a step."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from absl import logging

from engine.request import Group, RequestError, Update
from engine.server.errors import (
    RETRY_LATER,
    RETRY_SOON,
    ApiError,
    engine_failed,
    host_lost,
    shutting_down,
    still_loading,
)
from engine.server.metrics import Metrics
from engine.server.options import ServerOptions

if TYPE_CHECKING:  # importing it brings JAX, and the port opens before that
    from engine.core import Stats
    from engine.replicas import Engine

T = TypeVar("T")
WATCH_SECONDS = 0.25


class Ticket:
    """One HTTP request's groups on their way through the engine. Belongs to the event loop.

    `error` is set when it failed; `over` when nothing more will come, be it finished, failed or cancelled.
    """

    def __init__(self, groups: Sequence[Group], *, backlog: int | None, on_overflow: Callable[[], None]):
        self.groups = groups
        self.unfinished = {group.request_id: group.params.n for group in groups}
        self.error: ApiError | None = None
        self.over = False
        self.on_overflow = on_overflow
        self._accepted = asyncio.Event()
        self._backlog = backlog
        self._updates: list[Update] = []
        self._wake = asyncio.Event()

    async def accepted(self) -> None:
        """Wait until the engine has taken it. Errors: ApiError, if it hasn't."""
        await self._accepted.wait()
        if self.error is not None:
            raise self.error

    async def updates(self) -> list[Update]:
        """-> what came since the last call, waiting for something; [] when it is over."""
        while not self._updates and not self.over:
            self._wake.clear()
            await self._wake.wait()
        taken, self._updates = self._updates, []
        return taken

    async def finished(self) -> None:
        """Wait until it is over."""
        while not self.over:
            await self.updates()

    def put(self, update: Update) -> bool:
        """-> False when the reader is too far behind."""
        if self._backlog is None:  # nobody reads the updates: the groups hold everything
            return True
        self._updates.append(update)
        self._wake.set()
        return len(self._updates) <= self._backlog

    def accept(self) -> None:
        self._accepted.set()

    def end(self, error: ApiError | None = None) -> None:
        self.error = self.error or error
        self.over = True
        self._accepted.set()
        self._wake.set()


class Driver:
    """Owns the engine's thread. Every method but `_run` and what it calls is for the event loop."""

    def __init__(self, core_factory: Callable[[], Engine], options: ServerOptions, metrics: Metrics):
        self.core: Engine | None = None  # None while loading
        self.failure: BaseException | None = None  # why the engine's thread died
        self.loaded = asyncio.Event()
        self.ended = asyncio.Event()  # the thread has nothing more to do, for good or ill
        self.closed = False  # no new requests
        self._core_factory = core_factory
        self._options = options
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[str, Ticket] = {}
        self._outstanding = 0  # completions submitted and not ended
        self._unstarted: dict[str, int] = {}  # prompt tokens, times n, of each group that has yielded nothing yet
        self._unstarted_tokens = 0
        self._inbox: list[Callable[[Engine], None]] = []
        self._stopping = False
        self._wake = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- the event loop's side

    def ready(self) -> Engine:
        """-> the loaded core. Errors: ApiError 503 when there is none to be had."""
        if self.failure is not None:
            raise ApiError(503, engine_failed().message, code="engine_failed", headers=RETRY_LATER)
        if self.closed:
            raise shutting_down()
        if self.core is None:
            raise still_loading()
        return self.core

    def submit(self, groups: Sequence[Group], *, streaming: bool, on_overflow: Callable[[], None]) -> Ticket:
        """Hand all groups to the engine, or none. Errors: ApiError 429 when they would not fit into the queue.

        An empty server takes any request, else one that is larger than the queue would be told to retry for ever.
        """
        core = self.ready()
        completions = sum(group.params.n for group in groups)
        tokens = sum(len(group.prompt_token_ids) * group.params.n for group in groups)
        room = core.resolved.max_num_seqs + self._options.max_queue
        if self._outstanding and self._outstanding + completions > room:
            raise _queue_full(f"{self._outstanding} completions are queued or running, at most {room} may be")
        most = self._options.max_queue_tokens
        if self._unstarted_tokens and self._unstarted_tokens + tokens > most:
            raise _queue_full(f"{self._unstarted_tokens} prompt tokens are waiting, at most {most} may be")
        backlog = max(self._options.stream_backlog, 64 * completions) if streaming else None
        ticket = Ticket(groups, backlog=backlog, on_overflow=on_overflow)
        for group in groups:
            self._tickets[group.request_id] = ticket
            self._unstarted[group.request_id] = len(group.prompt_token_ids) * group.params.n
        self._outstanding += completions
        self._unstarted_tokens += tokens
        self._send(lambda core: self._add(core, ticket))
        return ticket

    def cancel(self, ticket: Ticket, error: ApiError | None = None) -> None:
        """Abort what is left of it in the engine. Harmless when it is over."""
        gone = [group for group in ticket.groups if ticket.unfinished.get(group.request_id)]
        for group in gone:
            self._forget(group, ticket.unfinished.pop(group.request_id), "abort" if error is None else "error")
        if gone:
            self._send(lambda core: [core.abort(group.request_id) for group in gone])
        ticket.end(error)

    def cancel_all(self, error: ApiError) -> None:
        """Tell every request that it failed."""
        for ticket in set(self._tickets.values()):
            self.cancel(ticket, error)

    async def call(self, function: Callable[[Engine], T]) -> T:
        """-> function(core), called in the engine's thread between two steps."""
        self.ready()
        future: asyncio.Future[T] = self._loop.create_future()

        def run(core: Engine) -> None:
            result = function(core)
            self._post(lambda: future.done() or future.set_result(result))

        self._send(run)
        ended = asyncio.ensure_future(self.ended.wait())
        await asyncio.wait((future, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not future.done():
            raise engine_failed() if self.failure else shutting_down()
        return future.result()

    def stop(self) -> None:
        """Let the thread end after the step that it is in; `ended` is set then."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def _send(self, command: Callable[[Engine], Any]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _loaded(self, core: Engine, stats: Stats) -> None:
        self.core = core
        self._metrics.loaded(core.config, core.resolved, stats)
        self.loaded.set()
        self._watch()

    def _accepted(self, ticket: Ticket, error: ApiError | None) -> None:
        if error is None:
            ticket.accept()
        else:
            self.cancel(ticket, error)

    def _deliver(self, updates: list[Update], stats: Stats, stepped: bool) -> None:
        self._metrics.observe_step(stats, stepped)
        now = time.monotonic()
        for update in updates:
            group = update.group
            ticket = self._tickets.get(group.request_id)
            if ticket is None:  # cancelled while the step ran
                continue
            self._start(group)
            self._metrics.emitted(update, now)
            if group.error is not None or update.finish_reason == "error":
                logging.error("%s failed: %s", group.request_id, group.error)
                reason = group.error or "the engine failed this request"
                self.cancel(ticket, ApiError(500, reason, code="request_failed"))
            elif not ticket.put(update):
                logging.warning("%s aborted: its reader is too slow", group.request_id)
                self.cancel(ticket)
                ticket.on_overflow()
            elif update.finish_reason is not None:
                self._finish(ticket, group, update.finish_reason)

    def _finish(self, ticket: Ticket, group: Group, reason: str) -> None:
        """One completion of the group has ended."""
        ticket.unfinished[group.request_id] -= 1
        if ticket.unfinished[group.request_id]:
            self._outstanding -= 1
            self._metrics.ended(reason)
            return
        del ticket.unfinished[group.request_id]
        self._forget(group, 1, reason)
        if not ticket.unfinished:
            ticket.end()

    def _start(self, group: Group) -> None:
        self._unstarted_tokens -= self._unstarted.pop(group.request_id, 0)

    def _forget(self, group: Group, completions: int, reason: str) -> None:
        """The last `completions` of the group have ended."""
        del self._tickets[group.request_id]
        self._start(group)
        self._outstanding -= completions
        for _ in range(completions):
            self._metrics.ended(reason)
        self._metrics.finished(group)

    def _died(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            self.cancel_all(host_lost() if isinstance(error, ConnectionError) else engine_failed())
            self.ended.set()

    def _watch(self) -> None:
        """Look whether the engine has failed while its thread waits for devices that will never answer."""
        assert self.core is not None
        if (failure := self.core.failure()) is not None:
            self._died(failure)
        elif not self.ended.is_set():
            self._loop.call_later(WATCH_SECONDS, self._watch)

    # -- the engine's side

    def _run(self) -> None:
        try:
            core = self._core_factory()
            stats = core.stats()
            self._post(lambda: self._loaded(core, stats))
            self._steps(core)
            core.close()
        except BaseException as error:  # the process must learn of it, whatever it is
            failure = error
            if not isinstance(error, (ValueError, OSError)):  # those explain themselves
                logging.exception("the engine's thread has died")
            self._post(lambda: self._died(failure))
        else:
            self._post(self.ended.set)

    def _steps(self, core: Engine) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._stopping or core.has_unfinished()):
                    self._wake.wait()
                if self._stopping:
                    return
                commands, self._inbox = self._inbox, []
            for command in commands:
                command(core)
            stepped = core.has_unfinished()
            updates = core.step() if stepped else []
            self._post(functools.partial(self._deliver, updates, core.stats(), stepped))

    def _add(self, core: Engine, ticket: Ticket) -> None:
        """Queue all of its groups; those of a ticket that is refused are aborted by the event loop."""
        error = None
        try:
            for group in ticket.groups:
                core.add(group)
        except RequestError as refusal:  # it can never fit
            error = ApiError(400, str(refusal), param=refusal.field)
        self._post(functools.partial(self._accepted, ticket, error))

    def _post(self, callback: Callable[[], Any]) -> None:
        """Run it in the event loop, which may be gone already."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


def _queue_full(message: str) -> ApiError:
    return ApiError(429, f"the queue is full: {message}; try again later", code="queue_full", headers=RETRY_SOON)
