"""Pictures of runs: latency over time, distributions of waiting, and what a sweep over rates trades for what."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from engine.bench.serve import Run

BLUE, ORANGE, GREY = "#2f6db3", "#d9772b", "#8a8f98"


def check() -> None:
    """Errors: ValueError if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot: needs matplotlib; pip install quire[plot]")


def new_figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    """-> a figure and its axes, in the form that all of our pictures share. No display is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw each run, and the sweep if there are several. -> the files."""
    paths = []
    for run in runs:
        name = f"{run.report['date']}-{run.rate:g}qps"
        paths += [_over_time(run, folder / f"{name}-latency.png"), _waiting(run, folder / f"{name}-waiting.png")]
    if len(runs) > 1:
        date = runs[0].report["date"]
        paths += [_throughput(runs, folder / f"{date}-throughput.png"), _pareto(runs, folder / f"{date}-pareto.png")]
    return paths


def _over_time(run: Run, path: Path) -> Path:
    good = [result for result in run.load.results if not result.error]
    figure, axes = new_figure(f"Latency over time, {run.rate:g} req/s", "request sent at (s)", "seconds")
    start = [result.start - run.start for result in good]
    axes.plot(start, [r.latency for r in good], ".", color=BLUE, label="end to end")
    axes.plot(start, [r.ttft for r in good], ".", color=ORANGE, label="first token")
    for result in run.load.results:
        if result.error:
            axes.axvline(result.start - run.start, color="crimson", alpha=0.4, linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


def _waiting(run: Run, path: Path) -> Path:
    """The distributions of TTFT and ITL, as the share of them that was at most so long."""
    good = [result for result in run.load.results if not result.error]
    figure, axes = new_figure(f"How long users wait, {run.rate:g} req/s", "milliseconds", "share of them")
    itl = [interval for result in good for interval in result.itl]
    for name, values, color in (("TTFT", [r.ttft for r in good], ORANGE), ("ITL", itl, BLUE)):
        if values:
            ordered = np.sort(values) * 1000
            axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=color, label=name)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


def _throughput(runs: Sequence[Run], path: Path) -> Path:
    """What was served against what was asked for; an infinite rate is a level."""
    figure, axes = new_figure("Throughput against rate", "requests/s asked for", "requests/s served")
    finite = sorted((run for run in runs if math.isfinite(run.rate)), key=lambda run: run.rate)
    served = lambda run: run.report["request_throughput"]
    if finite:
        rates = [run.rate for run in finite]
        axes.plot(rates, rates, "--", color=GREY, label="all that was asked for")
        axes.plot(rates, [served(run) for run in finite], "o-", color=BLUE, label="served")
    for run in runs:
        if math.isinf(run.rate):
            axes.axhline(served(run), color=ORANGE, label="all at once")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


def _pareto(runs: Sequence[Run], path: Path) -> Path:
    """Throughput of all against the speed that one user sees; what no other run beats in both is joined up."""
    figure, axes = new_figure("What a sweep trades", "tokens/s of one user (1 / median TPOT)", "output tokens/s of all")
    points = []
    for run in runs:
        tpots = [result.tpot for result in run.load.results if not result.error and result.tpot]
        if tpots:
            points.append((1 / float(np.median(tpots)), run.report["output_throughput"], f"{run.rate:g}"))
    best = pareto([(x, y) for x, y, _ in points])
    axes.plot([points[i][0] for i in best], [points[i][1] for i in best], "-", color=BLUE)
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", color=BLUE)
    for x, y, rate in points:
        axes.annotate(f"{rate} req/s", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_ylim(bottom=0)
    figure.savefig(path)
    return path


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """-> which points no other one beats in both, by the first coordinate falling."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front
