"""The way of one generation through the engine to its client: in one piece, or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

from absl import logging
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.request import Group
from engine.server.connection import watch_for_disconnect
from engine.server.driver import Driver, Ticket
from engine.server.errors import ApiError
from engine.server.wire import DONE, Format

_EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


async def answer(
    request: Request,
    driver: Driver,
    groups: Sequence[Group],
    form: Format,
    *,
    pool: Executor,
    stream: bool | None,
    include_usage: bool | None,
) -> Response:
    """-> the response, complete or to be streamed. Errors: ApiError, when it fails before anything is sent."""
    drop = request.scope["state"]["drop_connection"]
    ticket = driver.submit(groups, streaming=bool(stream), on_overflow=drop)
    if stream:
        await ticket.accepted()  # so that a refusal still has its status
        return EventStream(driver, ticket, form, include_usage=bool(include_usage))
    watcher = asyncio.create_task(watch_for_disconnect(request.receive, lambda: driver.cancel(ticket)))
    try:
        await ticket.finished()
        if ticket.error is not None:
            raise ticket.error
        if watcher.done():
            return Response(status_code=499)  # nobody is there to read it
        # Thousands of logprobs take a while: let the loop serve others.
        body = await asyncio.get_running_loop().run_in_executor(pool, form.response, groups)
        return Response(body, media_type="application/json")
    finally:
        watcher.cancel()
        driver.cancel(ticket)


class EventStream(Response):
    """Sends a ticket's updates as they come, all that came with one step in one piece."""

    def __init__(self, driver: Driver, ticket: Ticket, form: Format, *, include_usage: bool):
        super().__init__(headers=_EVENT_STREAM)
        del self.headers["content-length"]
        self.driver = driver
        self.ticket = ticket
        self.form = form
        self.include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ticket = self.ticket
        watcher = asyncio.create_task(watch_for_disconnect(receive, lambda: self.driver.cancel(ticket)))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            error = await self._send_updates(send)
            tail = b""
            if error is not None:
                tail = b"data: %b\n\n" % error.body()
            elif self.include_usage:
                tail = self.form.usage_chunk(ticket.groups)
            await send({"type": "http.response.body", "body": tail + DONE, "more_body": False})
        finally:
            watcher.cancel()
            self.driver.cancel(ticket)

    async def _send_updates(self, send: Send) -> ApiError | None:
        """-> why the stream ended early, if it did."""
        try:
            while updates := await self.ticket.updates():
                if data := b"".join(map(self.form.chunks, updates)):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:  # the client must be told; the status is sent already
            logging.exception("a stream failed")
            return ApiError(500, f"internal error: {type(error).__name__}")
        return self.ticket.error
