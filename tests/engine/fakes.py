"""A device for tests of the host's side: pages of tokens instead of keys and values, and a model that is a hash."""

from __future__ import annotations

import random
import zlib

from engine.pages import PagePool
from engine.request import Group, Request, RequestMetrics, SamplingParams
from engine.scheduler import Row, Scheduler, StepPlan


def next_token(tokens: list[int], vocab_size: int = 50) -> int:
    """-> the fake model's next token: any change to any token before it changes it."""
    return zlib.crc32(repr(tokens).encode()) % vocab_size


def make_request(
    tokens: list[int],
    max_tokens: int,
    *,
    name: str = "r",
    salt: str = "",
    priority: int = 0,
    stop: tuple[int, ...] = (),
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)
    group = Group(name, None, tokens, params, RequestMetrics(0.0), priority, salt)
    request = Request(group, 0, params, list(tokens), len(tokens), max_tokens, seed=0, stop_token_ids=frozenset(stop))
    group.requests.append(request)
    return request


class FakeDevice:
    """Runs plans as the step does: copies first, then every row's writes, then every row reads its whole context.

    `luck` draws how many of a row's drafts exist, and how many of those are right.
    """

    def __init__(self, pool: PagePool, num_slots: int, luck: random.Random | None = None):
        self.page_size, self.luck = pool.page_size, luck or random.Random(0)
        self.pages = [[("?", -1)] * pool.page_size for _ in range(pool.num_pages)]
        self.sequences: list[list[int]] = [[] for _ in range(num_slots)]

    def run(self, plan: StepPlan) -> list[list[int]]:
        """-> sampled tokens of each row. Asserts that each row finds its own tokens in its pages, salt and all."""
        sources = [list(self.pages[source]) for source, _ in plan.copies]
        for (_, destination), source in zip(plan.copies, sources, strict=True):
            self.pages[destination] = source
        for request in plan.admitted:
            assert request.slot is not None
            self.sequences[request.slot] = list(request.token_ids)
        work = [self._write(row) for row in plan.rows]
        return [self._sample(*done) for done in work]

    def _write(self, row: Row) -> tuple[Row, list[int], int, int]:
        """-> the row, its pages, how many of its tokens are computed, and how many drafts are right."""
        request, sequence = row.request, self.sequences[row.slot]
        known = row.start < len(request.token_ids)
        start = row.start if known else len(sequence) - 1
        if start >= row.limit:  # it has ended, and the host will see
            return row, [], 0, 0
        drafted = min(self.luck.randint(0, row.drafts), row.limit - start - 1)
        right = self.luck.randint(0, drafted)
        future = list(sequence)
        for _ in range(drafted):
            future.append(next_token(future))
        future[len(sequence) + right :] = [-1] * (drafted - right)
        for position in range(start, start + row.count + drafted):
            place = self.pages[request.pages[position // self.page_size]]
            place[position % self.page_size] = (request.group.cache_salt, future[position])
        return row, list(request.pages), start + row.count, right

    def _sample(self, row: Row, pages: list[int], length: int, right: int) -> list[int]:
        if not length:
            return [0]
        context = [self.pages[pages[i // self.page_size]][i % self.page_size] for i in range(length)]
        assert all(salt == row.request.group.cache_salt for salt, _ in context), "another tenant's page"
        found, sequence = [token for _, token in context], self.sequences[row.slot]
        assert found == sequence[:length], f"pages hold {found}, the sequence is {sequence}"
        tokens = []
        for _ in range(1 + right):
            tokens.append(next_token(found + tokens))
        if row.samples:
            sequence += tokens
        return tokens


def expected_tokens(request: Request) -> list[int]:
    """-> what the fake model generates for a request, alone."""
    tokens = list(request.group.prompt_token_ids)
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in request.stop_token_ids:
            break
    return tokens[request.num_prompt_tokens :]


def check(scheduler: Scheduler) -> None:
    """Assert that scheduler and pool agree."""
    scheduler.pool.check(list(scheduler.running))
    slots = [request.slot for request in scheduler.running]
    assert sorted([*slots, *scheduler.free_slots]) == list(range(len(slots) + len(scheduler.free_slots)))
    waiting = [request for _, request in scheduler.waiting if request.finish_reason is None]
    assert len(waiting) == scheduler.num_waiting
    assert not any(request.pages for request in waiting)
