"""What the auto-tuner is asked, and what it has found: its journal, which outlives the process, and its tables."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec


@dataclass(frozen=True)
class Workload:
    """What the best settings are looked for. Lengths are tokens."""

    model: str
    tensor_parallel_size: int
    input_len: int
    output_len: int
    max_model_len: int
    min_cache_hit_pct: int  # of each prompt, the share that all prompts begin with
    max_latency_allowed_ms: float  # bound on the p99 of end-to-end latency
    num_prompts: int  # of the run at an infinite rate
    num_prompts_search: int  # of the others
    precision: float  # of the rate, as a share of the throughput at an infinite rate
    search: str
    server_args: tuple[str, ...]

    def check(self) -> None:
        """Errors: ValueError."""
        if self.input_len + self.output_len > self.max_model_len:
            total = self.input_len + self.output_len
            raise ValueError(f"max_model_len: {self.max_model_len} is less than input and output, {total} tokens")

    def key(self, point: Point) -> str:
        """-> what the results of one point of the grid are kept under: they hold for the same workload only."""
        text = json.dumps([asdict(self), asdict(point)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class Trial:
    """One run of requests at one rate. Times are milliseconds, throughputs a second; rate None is infinite."""

    rate: float | None
    attempt: int
    passed: bool
    p99_e2el_ms: float
    mean_ttft_ms: float
    mean_tpot_ms: float
    request_throughput: float
    request_goodput: float
    output_throughput: float
    failed: int


@dataclass(frozen=True)
class Outcome:
    """What came of one point: its best trial, or why it has none."""

    point: Point
    status: str  # "ok", "bound missed" or "failed"
    reason: str = ""
    best: Trial | None = None

    @property
    def throughput(self) -> float:
        """-> requests a second within the bound; 0 if there are none."""
        return self.best.request_throughput if self.best else 0.0


class Record(msgspec.Struct, omit_defaults=True):
    """A line of the journal: a trial of a point, or its outcome."""

    key: str
    trial: Trial | None = None
    outcome: Outcome | None = None


class TuningJournal:
    """Every result, written to the disk as it comes. A line cut short by a crash is dropped when it is opened again."""

    def __init__(self, path: Path):
        self.path = path
        self.trials: dict[tuple[str, float | None, int], Trial] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._file = path.open("a+b")
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._take(msgspec.json.decode(line, type=Record))
            except msgspec.MsgspecError as error:
                self._file.close()
                raise ValueError(f"{path}:{number}: not a result of the tuner: {error}") from None
            end += len(line)
        self._file.truncate(end)

    def add(self, record: Record) -> None:
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(record)

    def __enter__(self) -> TuningJournal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _take(self, record: Record) -> None:
        if record.trial is not None:
            self.trials[record.key, record.trial.rate, record.trial.attempt] = record.trial
        if record.outcome is not None:
            self.outcomes[record.key] = record.outcome


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """-> the outcome with the highest request throughput among those that meet the bound."""
    return max((o for o in outcomes if o.best is not None), key=lambda o: o.throughput, default=None)


def csv_of(outcomes: Sequence[Outcome]) -> str:
    """-> a row for each outcome."""
    text = io.StringIO()
    names = [f.name for f in fields(Trial) if f.name not in ("attempt", "passed")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["max_num_seqs", "max_num_batched_tokens", "status", *names, "reason"])
    for outcome in outcomes:
        seen = asdict(outcome.best) if outcome.best else {}
        point = outcome.point
        if seen:
            seen["rate"] = seen["rate"] or "inf"
        row = [seen.get(name, "") for name in names]
        writer.writerow([point.max_num_seqs, point.max_num_batched_tokens, outcome.status, *row, outcome.reason])
    return text.getvalue()


def replace_file(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees the old text or the new one, whole."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text)
    os.replace(scratch, path)


def grid(num_seqs: Sequence[int], num_batched_tokens: Sequence[int]) -> Iterator[Point]:
    """Yields the points that the engine takes: every sequence needs a token of a step."""
    for seqs in num_seqs:
        yield from (Point(seqs, batched) for batched in num_batched_tokens if batched >= seqs)


def draw_heat_map(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Draw the throughput of every point; what failed or missed the bound says so."""
    import numpy as np

    from engine.bench.plots import new_figure

    seqs = sorted({o.point.max_num_seqs for o in outcomes})
    tokens = sorted({o.point.max_num_batched_tokens for o in outcomes})
    values = np.full((len(seqs), len(tokens)), np.nan)
    figure, axes = new_figure(title, "max_num_batched_tokens", "max_num_seqs")
    axes.grid(False)
    best = best_of(outcomes)
    most = max((o.throughput for o in outcomes), default=0.0)
    for outcome in outcomes:
        at = seqs.index(outcome.point.max_num_seqs), tokens.index(outcome.point.max_num_batched_tokens)
        text, dark = outcome.status, False
        if outcome.best is not None:
            values[at] = outcome.throughput
            rate = "inf" if outcome.best.rate is None else f"{outcome.best.rate:.2f}"
            text = f"{outcome.throughput:.2f} req/s\nat rate {rate}\np99 {outcome.best.p99_e2el_ms:.0f} ms"
            dark = outcome.throughput > 0.6 * most
        weight = "bold" if outcome is best else "normal"
        axes.text(
            at[1], at[0], text, ha="center", va="center", color="white" if dark else "black", weight=weight, fontsize=8
        )
    image = axes.imshow(values, cmap="Blues", aspect="auto", origin="lower", vmin=0, vmax=most or 1.0)
    axes.set_xticks(range(len(tokens)), map(str, tokens))
    axes.set_yticks(range(len(seqs)), map(str, seqs))
    figure.colorbar(image, label="requests/s within the bound")
    figure.savefig(path)


def report(outcomes: Sequence[Outcome], bound_ms: float) -> str:
    """-> the outcomes as a table for people."""
    lines = [f"{'max_num_seqs':>12} {'max_num_batched_tokens':>22} {'req/s':>8} {'rate':>8} {'p99 ms':>9}  "]
    for outcome in outcomes:
        head = f"{outcome.point.max_num_seqs:>12} {outcome.point.max_num_batched_tokens:>22}"
        if outcome.best is None:
            lines.append(f"{head} {outcome.status}: {outcome.reason}")
        else:
            rate: Any = "inf" if outcome.best.rate is None else f"{outcome.best.rate:.2f}"
            lines.append(f"{head} {outcome.throughput:8.2f} {rate:>8} {outcome.best.p99_e2el_ms:9.0f}")
    if best_of(outcomes) is None:
        lines.append(f"No point of the grid keeps the p99 of end-to-end latency within {bound_ms:g} ms.")
    return "\n".join(lines)
