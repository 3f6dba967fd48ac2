"""A device for tests of the host's side: pages of tokens instead of keys and values, and a model that is a hash."""

from __future__ import annotations

import zlib

from engine.pages import PagePool
from engine.request import Group, Request, RequestMetrics, SamplingParams
from engine.scheduler import Scheduler, StepPlan


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
    """Runs plans as the step does: copies first, then every row's writes, then every row reads its whole context."""

    def __init__(self, pool: PagePool, num_slots: int):
        self.page_size = pool.page_size
        self.pages = [[("?", -1)] * pool.page_size for _ in range(pool.num_pages)]
        self.sampled: list[dict[int, int]] = [{} for _ in range(num_slots)]

    def run(self, plan: StepPlan) -> list[int]:
        """-> one sampled token a row. Asserts that each row finds its own tokens in its pages, salt and all."""
        sources = [list(self.pages[source]) for source, _ in plan.copies]
        for (_, destination), source in zip(plan.copies, sources, strict=True):
            self.pages[destination] = source
        contexts = []
        for row in plan.rows:
            request, salt = row.request, row.request.group.cache_salt
            for position in range(row.start, row.start + row.count):
                known = position < len(request.token_ids)
                token = request.token_ids[position] if known else self.sampled[row.slot][position]
                self.pages[request.pages[position // self.page_size]][position % self.page_size] = (salt, token)
            contexts.append((row, list(request.pages)))
        tokens = []
        for row, pages in contexts:
            length = row.start + row.count
            context = [self.pages[pages[i // self.page_size]][i % self.page_size] for i in range(length)]
            assert all(salt == row.request.group.cache_salt for salt, _ in context), "another tenant's page"
            found = [token for _, token in context]
            known = row.request.token_ids[:length]
            assert found[: len(known)] == known, f"pages hold {found}, the sequence is {known}"
            token = next_token(found)
            if row.samples:
                self.sampled[row.slot][length] = token
            tokens.append(token)
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
