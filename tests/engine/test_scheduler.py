"""The scheduler, driven as the engine drives it: one step launched before the last one's tokens are known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pages import PagePool
from engine.request import Request, RequestError
from engine.scheduler import Scheduler, StepPlan
from tests.engine.fakes import FakeDevice, check, expected_tokens, make_request


class Engine:
    """Scheduler and fake device with one step in flight, as EngineCore runs them."""

    def __init__(
        self,
        *,
        num_pages=17,
        page_size=4,
        seqs=4,
        budget=16,
        max_len=40,
        caching=True,
        policy="fcfs",
        luck: random.Random | None = None,
    ):
        self.pool = PagePool(num_pages, page_size, caching)
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=max_len, policy=policy
        )
        self.device, self.luck = FakeDevice(self.pool, seqs, luck), luck
        self.in_flight: tuple[StepPlan, list[list[int]]] | None = None
        self.plans: list[StepPlan] = []

    def step(self) -> None:
        plan = self.scheduler.plan()
        assert plan.num_tokens == sum(row.count for row in plan.rows) <= self.scheduler.max_num_batched_tokens
        decodes = plan.rows and all(row.count == 1 and row.samples for row in plan.rows)
        if self.luck and decodes and self.luck.random() < 0.8:
            self.scheduler.add_drafts(plan, [self.luck.randint(0, 5) for _ in plan.rows])
        self.plans.append(plan)
        launched = (plan, self.device.run(plan)) if plan.rows else None
        previous, self.in_flight = self.in_flight, launched
        if previous:
            self.scheduler.commit(*previous)
        check(self.scheduler)

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_unfinished():
                return
            self.step()
        raise AssertionError("requests do not end")

    def generate(self, *requests: Request) -> list[list[int]]:
        for request in requests:
            self.scheduler.add(request)
        self.run()
        return [request.token_ids[request.num_prompt_tokens :] for request in requests]


@settings(max_examples=2000, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_schedule_ends_with_every_page_back_and_every_token_right(r: random.Random):
    check_a_schedule(r, speculates=False)


@settings(max_examples=600, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_schedule_with_drafts_ends_with_every_page_back_and_every_token_right(r: random.Random):
    check_a_schedule(r, speculates=True)


def check_a_schedule(r: random.Random, speculates: bool) -> None:
    page_size = r.choice([1, 2, 4, 8])
    max_len = r.randint(8, 48)
    seqs = r.randint(1, 6)
    engine = Engine(
        num_pages=-(-max_len // page_size) + 1 + r.randint(0, 12),
        page_size=page_size, seqs=seqs, budget=r.randint(seqs, 24), max_len=max_len,
        caching=r.random() < 0.8, policy=r.choice(["fcfs", "priority"]), luck=r if speculates else None,
    )  # fmt: skip
    stems = [[r.randrange(50) for _ in range(max_len)] for _ in range(2)]
    arrivals: list[Request] = []
    for i in range(r.randint(1, 10)):
        length = r.randint(1, max_len - 1)
        shared = r.randint(0, length)
        prompt = r.choice(stems)[:shared] + [r.randrange(50) for _ in range(length - shared)]
        priority = r.randint(0, 2) if engine.scheduler.policy == "priority" else 0
        stop = tuple(r.sample(range(50), r.choice([0, 0, 5])))
        arrivals.append(
            make_request(
                prompt,
                r.randint(1, max_len - length),
                name=str(i),
                salt=r.choice(["", "", "a"]),
                priority=priority,
                stop=stop,
            )
        )
    aborted = set()
    queue = list(arrivals)
    for _ in range(3000):
        while queue and r.random() < 0.5:
            engine.scheduler.add(queue.pop(0))
        alive = [a for a in arrivals if a not in queue and a.finish_reason is None]
        if alive and r.random() < 0.04:
            victim = r.choice(alive)
            aborted.add(victim)
            engine.scheduler.finish(victim, "abort")
            check(engine.scheduler)
        engine.step()
        if not queue and not engine.scheduler.has_unfinished():
            break
    assert not queue and not engine.scheduler.has_unfinished(), "requests do not end"
    assert len(engine.pool.free) == engine.pool.capacity, "pages are lost"
    for request in arrivals:
        got = request.token_ids[request.num_prompt_tokens :]
        want = expected_tokens(request)
        assert got == (want[: len(got)] if request in aborted else want)
    assert engine.pool.reset() and not engine.pool.cached


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    engine = Engine(budget=8, num_pages=30)
    short = make_request([1, 2, 3], 20)
    engine.scheduler.add(short)
    engine.step()
    long = make_request(list(range(30)), 4)
    engine.scheduler.add(long)
    engine.run()
    counts = [row.count for plan in engine.plans for row in plan.rows if row.request is long]
    assert counts[:5] == [7, 7, 7, 7, 2]
    mixed = [plan for plan in engine.plans if len(plan.rows) == 2]
    assert all(plan.rows[0].request is short or plan.rows[1].count == 1 for plan in mixed), "decodes come first"


def test_a_shared_prefix_is_computed_once_even_within_one_step():
    engine = Engine(budget=64, num_pages=40)
    prefix = list(range(16))
    first, second = make_request([*prefix, 20], 2), make_request([*prefix, 21], 2)
    engine.generate(first, second)
    assert [row.count for row in engine.plans[0].rows] == [1, 17]  # the second's one token comes first
    assert second.group.num_cached_tokens == 16


def test_a_partly_matching_page_is_copied_to_the_token():
    engine = Engine(page_size=8, num_pages=40)
    engine.generate(make_request(list(range(20)), 1))
    other = make_request([*range(13), 40, 41, 42], 1)
    engine.generate(other)
    assert other.group.num_cached_tokens == 13
    assert sum(len(plan.copies) for plan in engine.plans) == 1


def test_at_least_one_token_is_computed_of_a_prompt_that_is_cached_whole():
    engine = Engine(num_pages=40)
    prompt = list(range(16))
    engine.generate(make_request(prompt, 1))
    again = make_request(prompt, 1)
    engine.generate(again)
    assert again.group.num_cached_tokens == 15
    assert (engine.scheduler.prefix_cache_queries, engine.scheduler.prefix_cache_hits) == (32, 15)


def test_salts_keep_prefixes_apart():
    engine = Engine(num_pages=40)
    engine.generate(make_request(list(range(16)), 1, salt="a"))
    other = make_request(list(range(16)), 1, salt="b")
    engine.generate(other)
    assert other.group.num_cached_tokens == 0


def test_the_last_to_arrive_is_preempted_and_still_gets_its_tokens():
    engine = Engine(num_pages=11, seqs=2)
    first, second = make_request([1] * 8, 30), make_request([2] * 8, 30)
    assert engine.generate(first, second) == [expected_tokens(first), expected_tokens(second)]
    assert (first.num_preemptions, second.num_preemptions > 0) == (0, True)


def test_lower_priority_values_run_first():
    engine = Engine(seqs=1, policy="priority", num_pages=40)
    requests = [make_request([i] * 4, 2, name=str(i), priority=p) for i, p in enumerate([5, 9, 1])]
    for request in requests:
        engine.scheduler.add(request)
    engine.run()
    order = [row.request.group.priority for plan in engine.plans for row in plan.rows]
    assert list(dict.fromkeys(order)) == [1, 5, 9]


def test_priorities_are_refused_where_they_would_have_no_effect():
    with pytest.raises(RequestError, match="scheduling_policy"):
        Engine().scheduler.add(make_request([1], 1, priority=1))


def test_a_request_that_never_fits_is_refused_with_both_numbers():
    with pytest.raises(RequestError, match="needs 10 KV-cache pages, and the engine has 8"):
        Engine(num_pages=9).scheduler.add(make_request([1] * 30, 10))


def test_an_abort_frees_pages_at_once_also_with_a_step_in_flight():
    engine = Engine(num_pages=40)
    request = make_request([1] * 10, 20)
    engine.scheduler.add(request)
    engine.step()
    engine.step()
    engine.scheduler.finish(request, "abort")
    check(engine.scheduler)
    assert len(engine.pool.free) == engine.pool.capacity
    count = len(request.token_ids)
    engine.step()
    assert len(request.token_ids) == count


def test_a_row_without_finite_logits_fails_alone_and_leaves_the_prefix_cache():
    engine = Engine(num_pages=40)
    bad, good = make_request([7] * 12, 4), make_request([8] * 12, 4)
    for request in (bad, good):
        engine.scheduler.add(request)
    plan = engine.scheduler.plan()
    tokens = engine.device.run(plan)
    engine.scheduler.commit(plan, [[-1] if row.request is bad else t for row, t in zip(plan.rows, tokens, strict=True)])
    assert (bad.finish_reason, good.finish_reason) == ("error", None)
    again = make_request([7] * 12, 1)
    engine.generate(again)
    assert again.group.num_cached_tokens == 0
    check(engine.scheduler)
