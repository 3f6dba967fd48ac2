"""When requests are sent, and sending them: Poisson and gamma arrivals, ramps, and a bound on how many run at once."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.requests import Result


@dataclass(frozen=True)
class Ramp:
    """A request rate that grows with the number of requests sent, from `start` to `end` requests a second."""

    kind: str  # "linear" or "exponential"
    start: float
    end: float

    def rates(self, count: int) -> np.ndarray:
        """-> the rate before each of `count` requests."""
        progress = np.arange(count) / max(count - 1, 1)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * (self.end / self.start) ** progress


def arrival_times(
    count: int, rate: float, burstiness: float, random: np.random.Generator, ramp: Ramp | None = None
) -> np.ndarray:
    """-> seconds from the start at which each request is sent, float64 [count], the first at 0.

    Intervals are gamma distributed with shape `burstiness` and mean 1 / rate: 1 is a Poisson process, less is burstier,
    more is steadier. Without a ramp they are scaled so that their sum is the one that the rate asks for: a run of few
    requests has its rate too. An infinite rate sends everything at once.
    """
    if ramp is None and math.isinf(rate):
        return np.zeros(count)
    rates = ramp.rates(count - 1) if ramp else np.full(count - 1, rate)
    gaps = random.gamma(burstiness, 1.0 / (rates * burstiness))
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    if ramp is None and times[-1] > 0:
        times *= (count - 1) / rate / times[-1]
    return times


@dataclass(frozen=True)
class Load:
    """What came of a run. Times are seconds."""

    results: list[Result]
    duration: float  # from the first request to the last answer
    lateness: np.ndarray  # [requests]: by how much each was sent after its time, as far as it was ours
    cpu_share: float  # of one core, that this process took


async def run_load(
    requests: Sequence[Callable[[], Awaitable[Result]]],
    arrivals: np.ndarray,
    max_concurrency: int | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Load:
    """-> the results, in the requests' order. A request that waits for a free place is not late."""
    loop = asyncio.get_running_loop()
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    lateness = np.zeros(len(requests))

    async def one(request: Callable[[], Awaitable[Result]]) -> Result:
        if places is None:
            result = await request()
        else:
            async with places:
                result = await request()
        on_result(result)
        return result

    tasks: list[asyncio.Task[Result]] = []
    gc.collect()
    gc.disable()  # a collection in the middle would be measured as the server's
    cpu, start = time.process_time(), loop.time()
    try:
        async with asyncio.TaskGroup() as group:
            for i, (request, at) in enumerate(zip(requests, arrivals.tolist(), strict=True)):
                if (left := start + at - loop.time()) > 0:
                    await asyncio.sleep(left)
                lateness[i] = max(loop.time() - start - at, 0.0)
                tasks.append(group.create_task(one(request)))
        duration = loop.time() - start
    finally:
        gc.enable()
    results = [task.result() for task in tasks]
    return Load(results, duration, lateness, (time.process_time() - cpu) / max(duration, 1e-9))
