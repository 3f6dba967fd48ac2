"""The loop of a batch: lines are read and tokenized ahead, the engine steps, rows are written as they are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.batch.answers import Embedding, Generation, prepare
from engine.batch.journal import Journal, lines_of
from engine.batch.rows import BadLine, Line, digest, parse, row_of_answer, row_of_error
from engine.request import NoRoom, RequestError
from engine.server import embeddings
from engine.server.errors import ApiError

if TYPE_CHECKING:
    from engine.replicas import Engine

THREADS = 4  # that tokenize


@dataclass
class _Running:
    """A line in the engine."""

    line: Line
    work: Generation
    left: int  # completions that have not ended


class Batch:
    """One run over an input. At most `window` lines are in hand at a time: memory does not grow with the file.

    With `keep_order` rows are written in the input's order, and wait for the slowest line before them.
    """

    def __init__(
        self,
        core: Engine,
        journal: Journal,
        *,
        model: str,
        parser: str | None = None,
        keep_order: bool = False,
        window: int | None = None,
        on_row: Callable[[bool], None] = lambda failed: None,
    ):
        self.core, self.journal, self.model, self.parser = core, journal, model, parser
        self.window = window or 4 * core.resolved.max_num_seqs
        self._on_row = on_row
        self._keep_order = keep_order
        self._order: deque[int] = deque()  # numbers of the lines in hand, oldest first
        self._ready: dict[int, tuple[int, bytes]] = {}  # rows that wait for their turn
        self._preparing: deque[tuple[Line, Future[Generation | Embedding]]] = deque()
        self._running: dict[str, _Running] = {}  # by request id
        self._in_hand = 0

    def run(self, path: Path) -> None:
        """Answer every line that the journal lacks. Errors: ValueError, if the journal is of another input."""
        lines = self._undone(path)
        with ThreadPoolExecutor(THREADS, "tokenizer") as pool:
            more = True
            while more or self._in_hand:
                while more and self._in_hand < self.window:
                    more = self._take(next(lines, None), pool)
                self._admit()
                if self.core.has_unfinished():
                    self._step()
                self.journal.flush()

    def _undone(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """Yields the lines that are to do. Those that are done must be the ones that the journal knows."""
        for number, text in lines_of(path):
            known = self.journal.has(number)
            if not known:
                yield number, text
            elif known != digest(_id_of(number, text)):
                raise ValueError(
                    f"{self.journal.path}: line {number + 1} of {path} has another custom_id than its answer there; "
                    "name another output file"
                )

    def _take(self, numbered: tuple[int, bytes] | None, pool: ThreadPoolExecutor) -> bool:
        """Take a line in hand. -> False when there is none."""
        if numbered is None:
            return False
        number, text = numbered
        self._in_hand += 1
        if self._keep_order:
            self._order.append(number)
        try:
            line = parse(number, text)
        except BadLine as error:
            failure = ApiError(400, str(error), code="invalid_line")
            self._done(number, error.custom_id, row_of_error(number, error.custom_id, failure), failed=True)
            return True
        self._preparing.append((line, pool.submit(prepare, self.core, line, self.model, self.parser)))
        return True

    def _admit(self) -> None:
        """Give the engine what is tokenized; wait for that only if it has nothing else to do."""
        while self._preparing:
            line, future = self._preparing[0]
            if not future.done() and self.core.has_unfinished():
                return
            try:
                work = future.result()
                if isinstance(work, Embedding):
                    if not self._embed(line, work):
                        return
                else:
                    self._add(line, work)
            except ApiError as error:
                self._failed(line, error)
            self._preparing.popleft()

    def _add(self, line: Line, work: Generation) -> None:
        running = _Running(line, work, sum(group.params.n for group in work.groups))
        try:
            for group in work.groups:
                self.core.add(group)
        except RequestError as error:  # it can never fit
            for group in work.groups:
                self.core.abort(group.request_id)
            raise ApiError(400, str(error), param=error.field) from None
        for group in work.groups:
            self._running[group.request_id] = running

    def _embed(self, line: Line, work: Embedding) -> bool:
        """-> False while running requests hold the pages that it needs. Errors: ApiError."""
        vectors = []
        try:
            for portion in embeddings.portions(work.prompts, self.core.resolved.max_num_batched_tokens):
                pooling, normalize = work.request.pooling or "last", work.request.normalize is not False
                vectors.extend(self.core.embed(portion, pooling, normalize))
        except NoRoom:
            if self.core.has_unfinished():
                return False
            raise ApiError(400, "input: is more than the KV cache holds") from None
        except ValueError as error:
            raise ApiError(500, str(error)) from None
        self._done(line.number, line.custom_id, row_of_answer(line, work.write(self.model, vectors)))
        return True

    def _step(self) -> None:
        for update in self.core.step():
            running = self._running.get(update.group.request_id)
            if running is None or update.finish_reason is None:
                continue
            if update.finish_reason == "error":
                self._forget(running)
                reason = update.group.error or "the engine failed this request"
                self._failed(running.line, ApiError(500, reason, code="request_failed"))
                continue
            running.left -= 1
            if not running.left:
                self._forget(running)
                line = running.line
                self._done(line.number, line.custom_id, row_of_answer(line, running.work.write()))

    def _forget(self, running: _Running) -> None:
        for group in running.work.groups:
            del self._running[group.request_id]
            if not group.finished():
                self.core.abort(group.request_id)

    def _failed(self, line: Line, error: ApiError) -> None:
        row = row_of_error(line.number, line.custom_id, error)
        self._done(line.number, line.custom_id, row, failed=True)

    def _done(self, number: int, custom_id: str | None, row: bytes, *, failed: bool = False) -> None:
        self._in_hand -= not self._keep_order
        self._on_row(failed)
        if not self._keep_order:
            self.journal.append(number, digest(custom_id), row)
            return
        self._ready[number] = digest(custom_id), row
        while self._order and self._order[0] in self._ready:
            first = self._order.popleft()
            self.journal.append(first, *self._ready.pop(first))
            self._in_hand -= 1


def _id_of(number: int, text: bytes) -> str | None:
    """-> the custom_id under which a line is answered."""
    try:
        return parse(number, text).custom_id
    except BadLine as error:
        return error.custom_id
