"""What the next step computes: admission, chunked prefill, preemption. Plain host Python over requests and pages.

There is no prefill phase and no decode phase: every step takes the tokens that each request still lacks, first those
of running requests, then chunks of waiting prompts, up to one budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.pages import PagePool
from engine.request import Request, RequestError


@dataclass(slots=True)
class Row:
    """One request's share of a step: tokens [start, start + count) of its sequence."""

    request: Request
    slot: int
    start: int
    count: int
    samples: bool  # the last of its tokens is the sequence's last: the step samples the next one
    drafts: int = 0  # tokens behind it that may be drafted and verified in the same step
    given: Sequence[int] = ()  # drafts, where the host makes them
    limit: int = 0  # positions below have their place in the request's pages, and may be computed


@dataclass(slots=True)
class StepPlan:
    """One step, in the order of its rows: those with one token first.

    `copies` (source page, destination page) and `admitted` (requests that took a slot) come before the step's work.
    """

    rows: list[Row] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    num_tokens: int = 0
    speculates: bool = False  # rows may have drafts; then each has one token besides, and samples
    fills: list[Row] = field(default_factory=list)  # tokens that the draft model must see before


class Scheduler:
    """Keeps requests waiting or running, and gives them tokens, pages and slots.

    `plan` may be called again before the plan before is committed: a request whose last token is still being sampled
    counts it as present, without knowing it. Sampled tokens arrive through `commit`.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: str = "fcfs",
    ):
        assert max_num_batched_tokens >= max_num_seqs, "every running request must get its token in every step"
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.policy = policy
        self.waiting: list[tuple[tuple[int, int], Request]] = []  # a heap; aborted ones are dropped at its top
        self.num_waiting = 0
        self.running: dict[Request, None] = {}  # in order of admission
        self.free_slots = list(reversed(range(max_num_seqs)))
        self.num_arrived = 0
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens looked up
        self.prefix_cache_hits = 0  # tokens found

    def add(self, request: Request) -> None:
        """Queue a request. Errors: RequestError if it can never run."""
        if self.policy == "fcfs" and request.group.priority != 0:
            raise RequestError("priority", "needs scheduling_policy='priority', and the engine runs 'fcfs'")
        need = self.pool.pages_for(min(request.num_prompt_tokens + request.max_tokens, self.max_model_len))
        if need > self.pool.capacity:
            raise RequestError("prompt", f"needs {need} KV-cache pages, and the engine has {self.pool.capacity}")
        request.arrival = self.num_arrived
        self.num_arrived += 1
        self._enqueue(request)

    def has_unfinished(self) -> bool:
        return bool(self.num_waiting or self.running)

    def plan(self) -> StepPlan:
        """-> the next step; without rows when nobody can take a token before an earlier step is committed."""
        self.pool.epoch += 1
        plan = StepPlan()
        preempted = self._plan_running(plan)
        if not preempted:
            self._plan_waiting(plan)
        plan.rows.sort(key=lambda row: row.count > 1)  # stable: decodes first, else in order
        return plan

    def commit(self, plan: StepPlan, sampled: Sequence[Sequence[int]]) -> list[tuple[Row, Sequence[int]]]:
        """Take what a step sampled for each row (ignored where it doesn't): a token, and more if drafts were right.

        -> (row, tokens) where tokens now belong to the row's request; those of requests that ended meanwhile, or behind
        the token that ended one, are discarded. A token below 0 means that logits were not finite: the request ends
        with "error".
        """
        accepted = []
        for row, tokens in zip(plan.rows, sampled, strict=True):
            request = row.request
            if not row.samples:
                continue
            request.num_in_flight -= 1
            request.num_drafts_in_flight -= row.drafts
            if request.finish_reason is not None:
                continue
            if request.slot is not None:
                computed = request.num_computed_tokens + len(tokens) - 1
                request.num_computed_tokens = min(computed, request.most_computed_tokens)
            accepted.append((row, self._take(request, tokens)))
        return accepted

    def _take(self, request: Request, tokens: Sequence[int]) -> Sequence[int]:
        """Append sampled tokens to a request, up to the one that ends it. -> those that were."""
        room = request.max_tokens - (len(request.token_ids) - request.num_prompt_tokens)
        for count, token in enumerate(tokens):
            if token < 0:
                self.pool.forget(request.pages)
                self.finish(request, "error", register=False)
                return tokens[:count]
            request.token_ids.append(token)
            if token in request.stop_token_ids:
                self.finish(request, "stop")
            elif count + 1 == room:
                self.finish(request, "length")
            if request.finish_reason is not None:
                return tokens[: count + 1]
        if request.slot is not None:
            self.pool.register(request)
        return tokens

    def add_drafts(self, plan: StepPlan, wanted: Sequence[int]) -> None:
        """Let each row of a plan of decodes verify up to so many drafts, as far as there are pages to spare for them.

        How many tokens a sequence has may not be known yet: then a row gets pages for the most that it can have.
        """
        plan.speculates = True
        spare = min(len(self.running), self.pool.capacity // 100)
        for row, count in zip(plan.rows, wanted, strict=True):
            request, assumed = row.request, row.start + 1 + row.request.num_drafts_in_flight
            count = min(count, request.most_computed_tokens - row.start - 1)
            if count <= 0:
                continue
            most = min(assumed + count, request.most_computed_tokens)
            need = self.pool.pages_for(most) - len(request.pages)
            if need > 0:
                if need + spare > len(self.pool.free):
                    continue
                request.pages += self.pool.allocate(need) or []
            row.limit, row.drafts = most, count
            request.num_drafts_in_flight += count

    def finish(self, request: Request, reason: str, *, register: bool = True) -> None:
        """End a request, wherever it is, and free what it holds at once. Later steps discard its tokens."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        if request in self.running:
            if register:
                self.pool.register(request)
            self._leave(request)
        else:
            self.num_waiting -= 1

    def _plan_running(self, plan: StepPlan) -> bool:
        """Give every running request its tokens. -> whether one had to be preempted, since pages ran out."""
        preempted = False
        for request in self._decodes_first():
            if request.slot is None or request.num_output_tokens >= request.max_tokens:
                continue  # preempted just now, or its last token is being sampled
            count = min(request.num_tokens - request.num_computed_tokens, self._budget(plan))
            if count <= 0:
                continue
            need = self.pool.pages_for(self._most_computed(request, count)) - len(request.pages)
            if need > 0:
                pages = self.pool.allocate(need)
                while pages is None and (victim := self._victim(plan)) is not request:
                    self._preempt(victim)
                    preempted = True
                    pages = self.pool.allocate(need)
                if pages is None:
                    self._preempt(request)
                    preempted = True
                    continue
                request.pages += pages
            self._schedule(plan, request, count)
        return preempted

    def _decodes_first(self) -> list[Request]:
        """-> the running requests, those still in their prompt last, so that a long prompt starves nobody."""
        order: tuple[list[Request], list[Request]] = ([], [])
        for request in self.running:
            order[request.num_tokens - request.num_computed_tokens > 1].append(request)
        if self.policy == "priority":
            for part in order:
                part.sort(key=lambda request: request.priority)
        return order[0] + order[1]

    def _plan_waiting(self, plan: StepPlan) -> None:
        """Admit waiting requests while there are tokens, slots and pages for the whole of their prompt."""
        while self.free_slots and self._budget(plan) > 0:
            while self.waiting and self.waiting[0][1].finish_reason is not None:
                heapq.heappop(self.waiting)
            if not self.waiting:
                return
            request = self.waiting[0][1]
            if request.num_in_flight:
                return  # preempted with a token under way: its turn comes when that is known
            match = self.pool.match(request) if request.params.prompt_logprobs is None else None
            shared = match.pages if match else []
            need = self.pool.pages_for(request.num_tokens) - len(shared)
            # A page to spare for each running request keeps a newcomer from being preempted by the next decode.
            spare = min(len(self.running), self.pool.capacity // 100)
            if need + self.pool.num_idle(shared) + spare > len(self.pool.free):
                return
            heapq.heappop(self.waiting)
            self.num_waiting -= 1
            self.pool.share(shared)
            pages = self.pool.allocate(need)
            assert pages is not None
            request.pages = shared + pages
            request.num_registered_pages = len(shared)
            request.num_computed_tokens = len(shared) * self.pool.page_size
            if match and match.copy_from is not None:
                plan.copies.append((match.copy_from, pages[0]))
                request.num_computed_tokens += match.num_copied
            if match and self.pool.enable_prefix_caching and request.num_preemptions == 0:
                self.prefix_cache_queries += request.num_tokens
                self.prefix_cache_hits += request.num_computed_tokens
                request.group.num_cached_tokens = max(request.group.num_cached_tokens, request.num_computed_tokens)
            request.slot = self.free_slots.pop()
            self.running[request] = None
            plan.admitted.append(request)
            self._schedule(plan, request, min(request.num_tokens - request.num_computed_tokens, self._budget(plan)))

    def _budget(self, plan: StepPlan) -> int:
        return self.max_num_batched_tokens - plan.num_tokens

    def _schedule(self, plan: StepPlan, request: Request, count: int) -> None:
        start = request.num_computed_tokens
        samples = start + count == request.num_tokens
        assert request.slot is not None
        limit = self._most_computed(request, count)
        plan.rows.append(Row(request, request.slot, start, count, samples, limit=limit))
        plan.num_tokens += count
        request.num_computed_tokens += count
        request.num_in_flight += samples
        if count > 1:  # what a decode adds is registered when its token is known
            self.pool.register(request)

    def _most_computed(self, request: Request, count: int) -> int:
        """-> how many of its tokens may be computed after `count` more, if all drafts in flight are right."""
        return min(request.num_computed_tokens + request.num_drafts_in_flight + count, request.most_computed_tokens)

    def _victim(self, plan: StepPlan) -> Request:
        """-> whom to preempt: the last to arrive of the least urgent, of those not yet in this plan."""
        planned = {row.request for row in plan.rows}
        return max((request for request in self.running if request not in planned), key=lambda r: r.priority)

    def _preempt(self, request: Request) -> None:
        """Free a running request's pages and queue it in front of those that came after it; it is computed anew."""
        self._leave(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        heapq.heappush(self.waiting, (request.priority, request))
        self.num_waiting += 1

    def _leave(self, request: Request) -> None:
        del self.running[request]
        self.pool.release(request.pages)
        assert request.slot is not None
        self.free_slots.append(request.slot)
        request.pages = []
        request.slot = None
        request.num_computed_tokens = 0
        request.num_registered_pages = 0
