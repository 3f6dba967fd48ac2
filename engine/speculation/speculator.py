"""Speculator: the host's part of speculation. It gives a plan its drafts, and learns from what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from engine.request import Request
from engine.scheduler import Row, Scheduler, StepPlan
from engine.slots import is_plain
from engine.speculation.policy import Acceptance, Policy
from engine.speculation.suffix import Suffixes
from engine.speculative_config import SpeculativeConfig


@dataclass
class SpeculationStats:
    """Counters since the start: rows with drafts, drafts that were verified and kept, and kept ones by their place."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)


def in_all(each: Sequence[SpeculationStats]) -> SpeculationStats | None:
    """-> the sums of several engines' counters; None of none."""
    if not each:
        return None
    total = lambda name: sum(getattr(stats, name) for stats in each)
    places = [sum(counts) for counts in zip(*(stats.accepted_per_position for stats in each), strict=True)]
    return SpeculationStats(total("num_drafts"), total("num_draft_tokens"), total("num_accepted_tokens"), places)


class Speculator:
    """Keeps what is known of each running request's drafts."""

    def __init__(self, config: SpeculativeConfig, policy: Policy):
        self.config, self.policy = config, policy
        self.stats = SpeculationStats(accepted_per_position=[0] * config.num_speculative_tokens)
        self._acceptance: dict[Request, Acceptance] = {}
        self._seen: dict[Request, Repeats] = {}
        self._drafting: set[Request] = set()  # rows of the last plan, if it speculates
        self._sampled: set[Request] = set()  # requests that have had a token sampled since they were admitted
        self._suffixes = Suffixes(config) if config.method == "suffix" else None
        self._made: dict[Request, list[int]] = {}  # drafts for the plan at hand
        self._filled: dict[Request, int] = {}  # tokens that the draft model has seen, of those that are not in there

    def extend(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """Add drafts to a plan, if it is one of decodes and they are worth their time."""
        for request in plan.admitted:
            self._filled.pop(request, None)
        self._made.clear()
        drafting, self._drafting = self._drafting, set()
        self._sampled.difference_update(plan.admitted)
        newcomers = {row.request for row in plan.rows if row.samples} - self._sampled
        self._sampled |= newcomers
        if not plan.rows or any(row.count > 1 or not row.samples for row in plan.rows):
            return
        if newcomers and self.config.has_head:
            return  # what it made of the token before a prompt's last is not kept: that was cached, or in a step before
        chances = [self._chance(row.request) for row in plan.rows]
        if not any(chances):
            return
        wanted = self.policy.drafts(chances, all(is_plain(row.request) for row in plan.rows))
        if wanted is not None:
            if self._suffixes is not None:
                for i, row in enumerate(plan.rows):
                    row.given = self._made[row.request][: wanted[i]]
                    wanted[i] = len(row.given)
            scheduler.add_drafts(plan, wanted)
            self._drafting = {row.request for row in plan.rows}
            if self.config.method == "draft_model":
                plan.fills = [fill for row in plan.rows if row.request not in drafting for fill in self._fill(row)]

    def must_know(self, running: Iterable[Request]) -> bool:
        """-> whether what is in flight must be known before the next plan: the host is to draft behind it."""
        if self._suffixes is None:
            return False
        requests = list(running)
        chances = [self._chance(request) for request in requests]
        plain = all(is_plain(request) for request in requests)
        return any(chances) and self.policy.are_worth_it(chances, plain)

    def _fill(self, row: Row) -> Iterator[Row]:
        """Yields the tokens, short of the last two, that the draft model has not seen of a row of known length."""
        start = self._filled.get(row.request, 0)
        if (count := row.start - 1 - start) > 0:
            yield Row(row.request, row.slot, start, count, samples=False)

    def observe(self, row: Row, kept: int, drafted: int) -> None:
        """Take in that of a row's `drafted` drafts `kept` were right."""
        if row.request.finish_reason is None:
            self._filled[row.request] = len(row.request.token_ids) - 2
        if not drafted:
            return
        stats, metrics = self.stats, row.request.group.metrics
        stats.num_drafts += 1
        stats.num_draft_tokens += drafted
        stats.num_accepted_tokens += kept
        for place in range(kept):
            stats.accepted_per_position[place] += 1
        metrics.num_draft_tokens += drafted
        metrics.num_accepted_tokens += kept
        self.policy.observe(kept, drafted)
        if row.request.finish_reason is None:
            self._acceptance.setdefault(row.request, self.policy.newcomer()).observe(kept, drafted)

    def snapshot(self) -> SpeculationStats:
        """-> the counters as they are now."""
        return replace(self.stats, accepted_per_position=list(self.stats.accepted_per_position))

    def forget(self, request: Request) -> None:
        """A request has ended."""
        if self._suffixes is not None:
            self._suffixes.end(request)
        self._acceptance.pop(request, None)
        self._seen.pop(request, None)
        self._filled.pop(request, None)
        self._sampled.discard(request)

    def _chance(self, request: Request) -> float:
        """-> how likely the request's next draft is right, as far as can be told."""
        if self._suffixes is not None:
            drafts = self._made[request] = self._suffixes.propose(request, self.config.num_speculative_tokens)
            if not drafts:
                return 0.0
        if self.config.method == "ngram" and self.config.adaptive:
            repeats = self._seen.setdefault(request, Repeats(self.config.prompt_lookup_min))
            if not repeats.ends_in_one(request.token_ids):
                return 0.0
        known = self._acceptance.get(request)
        return (known or self.policy.newcomer()).chance


class Repeats:
    """Whether a growing sequence ends in tokens that it has had before: without that, prompt lookup drafts nothing."""

    def __init__(self, size: int):
        self._size, self._length = size, 0
        self._had: set[Sequence[int]] = set()

    def ends_in_one(self, tokens: list[int]) -> bool:
        """-> whether the last `size` of the tokens occurred before. Tokens may only have been appended since."""
        size = self._size
        for end in range(max(self._length, size), len(tokens)):
            self._had.add(tuple(tokens[end - size : end]))
        self._length = len(tokens)
        return tuple(tokens[-size:]) in self._had
