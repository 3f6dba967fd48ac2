"""How many drafts each row of a step gets: as many as its own acceptance makes worth the time they take, down to none.

Costs are measured (`Runner.step_seconds`), not assumed: on a GPU that waits for memory drafts are nearly free, on a CPU
a step of five tokens takes twice as long as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.step_input import StepShape

FIRST_GUESS = 0.6  # the chance of a draft to be right, before anything is known
PRIOR = 2.0  # drafts that a guess counts for
MEMORY = 0.9  # what an observation still counts for after the next
GUESS_MEMORY = 0.995
MOST = 0.98  # no request is ever sure: more drafts always gain less
GAIN = 1.02  # by which drafts must be faster than none
PROBES = 0.005  # share of the time that may go to trying drafts again where they were not worth it


@dataclass(slots=True)
class Acceptance:
    """What became of a request's drafts: a decaying count of those that were right, and of those whose turn came."""

    right: float
    tried: float

    @property
    def chance(self) -> float:
        """-> the chance of a draft to be right when all before it are, 0 to 1."""
        return min(self.right / self.tried, MOST)

    def observe(self, kept: int, drafted: int) -> None:
        """Of `drafted` drafts, `kept` were right and the next, if there is one, was not."""
        self.right = MEMORY * self.right + kept
        self.tried = MEMORY * self.tried + kept + (kept < drafted)


class Policy:
    """Decides for one step after another. `shapes` are the runner's, `seconds` what those of decodes take."""

    def __init__(
        self, shapes: Sequence[StepShape], seconds: Mapping[StepShape, float], most_drafts: int, adaptive: bool
    ):
        self.shapes, self.seconds = shapes, seconds
        self.most_drafts, self.adaptive = most_drafts, adaptive
        self._guess = Acceptance(FIRST_GUESS * PRIOR, PRIOR)  # over all requests
        self._spare = 0.0  # seconds that may go to a probe

    def newcomer(self) -> Acceptance:
        """-> what to think of a request that has drafted nothing yet."""
        return Acceptance(self._guess.chance * PRIOR, PRIOR)

    def observe(self, kept: int, drafted: int) -> None:
        """Learn from one row for requests to come."""
        share = 1 - GUESS_MEMORY
        guess, turns = self._guess, kept + (kept < drafted)
        guess.right += share * (kept - guess.right * turns / guess.tried)

    def drafts(self, chances: Sequence[float], plain: bool) -> list[int] | None:
        """-> drafts for each row of a step of decodes, whose next draft is right with such a chance; None: for none.

        `plain`: as for step_input.choose_shape.
        """
        rows = len(chances)
        fitting = [s for s in self.shapes if s.rows >= rows and s.drafts and (plain or not s.plain)]
        if not fitting:
            return None
        if not self.adaptive:
            largest = min(fitting, key=lambda s: (s.rows + s.drafts * rows > s.tokens, s.tokens))
            each = min(self.most_drafts, (largest.tokens - rows) // rows)
            return [each] * rows
        shape, gain, base = self._best(chances, fitting, plain)
        if gain < GAIN and not self._may_probe(base, self.seconds[shape]):
            return None
        worth = self._worth(chances)
        room = shape.tokens - rows
        least = np.sort(worth, axis=None)[-room] if room < worth.size else 0.0
        counts = np.sum((worth >= least) & (worth > 0), axis=1).tolist()
        for i, count in enumerate(counts):  # equals at the least worth may be more than there is room for
            counts[i] = min(count, room)
            room -= counts[i]
        return counts

    def are_worth_it(self, chances: Sequence[float], plain: bool) -> bool:
        """-> whether `drafts` would give some, without counting what it does as a step."""
        fitting = [s for s in self.shapes if s.rows >= len(chances) and s.drafts and (plain or not s.plain)]
        return bool(fitting) and (not self.adaptive or self._best(chances, fitting, plain)[1] >= GAIN)

    def _worth(self, chances: Sequence[float]) -> np.ndarray:
        """-> [rows, drafts]: the chance that a row's first, second ... draft is kept."""
        return np.minimum(np.array(chances), MOST)[:, None] ** np.arange(1, self.most_drafts + 1)[None]

    def _best(
        self, chances: Sequence[float], fitting: Sequence[StepShape], plain: bool
    ) -> tuple[StepShape, float, float]:
        """-> the shape that makes most tokens a second with the best drafts that it has room for, how many times as
        many that is as without, and the seconds of a step without."""
        rows = len(chances)
        best = np.sort(self._worth(chances), axis=None)[::-1]
        without = [s for s in self.shapes if not s.drafts and s.rows == s.tokens >= rows and (plain or not s.plain)]
        base = min(self.seconds[s] for s in without)
        gains = {s: (rows + float(best[: s.tokens - rows].sum())) * base / (self.seconds[s] * rows) for s in fitting}
        shape = max(fitting, key=lambda s: gains[s])
        return shape, gains[shape], base

    def _may_probe(self, base: float, cost: float) -> bool:
        """-> whether enough steps have been made without drafts to pay for one with them."""
        self._spare = min(self._spare + PROBES * base, cost)
        if self._spare < cost - base:
            return False
        self._spare = 0.0
        return True
