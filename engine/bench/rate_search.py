"""The highest request rate at which a server still keeps a promise, found with few runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar


class Trial(Protocol):
    """What came of one run at a rate."""

    @property
    def passed(self) -> bool:
        """Whether the promise was kept."""
        ...


T = TypeVar("T", bound=Trial)


def binary(measure: Callable[[float, int], T], ceiling: float, precision: float) -> T | None:
    """-> the trial at the highest rate that passes twice, within `precision` of the ceiling; None if there is none.

    `measure(rate, attempt)` makes a run; attempts differ in their arrivals. `ceiling` is tried first: a server that
    fails when all comes at once may still keep pace with its own throughput. A rate that passed once and fails the
    second time counts as failed, and the search goes on below it.
    """
    low, high = 0.0, ceiling
    passed: list[tuple[float, T]] = []  # by rising rate
    rate = ceiling
    while True:
        trial = measure(rate, 0)
        if trial.passed:
            low = rate
            passed.append((rate, trial))
        else:
            high = rate
        if low >= ceiling or high - low <= precision * ceiling:
            while passed and not measure(passed[-1][0], 1).passed:
                high = passed.pop()[0]
            low = passed[-1][0] if passed else 0.0
            if low >= ceiling or high - low <= precision * ceiling:
                return passed[-1][1] if passed else None
        rate = (low + high) / 2


def linear(measure: Callable[[float, int], T], ceiling: float, precision: float) -> T | None:
    """The same by trying every rate from the ceiling down, in steps of `precision` times the ceiling."""
    steps = round(1 / precision)
    for step in range(steps, 0, -1):
        rate = ceiling * step / steps
        trial = measure(rate, 0)
        if trial.passed and measure(rate, 1).passed:
            return trial
    return None


SEARCHES = {"binary": binary, "linear": linear}
