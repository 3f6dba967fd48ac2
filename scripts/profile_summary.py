"""A profiler trace as a table: what the device did, by kind and by kernel, how long it was idle, and the host's part.

    python scripts/profile_summary.py FOLDER [--top 25]

FOLDER is what `jax.profiler.trace` wrote (`bench_offline.py --profile FOLDER`). A kernel's kind is told by its name;
what the name does not tell counts as "other".
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

KINDS = {  # the first that matches
    "attention": r"attend|combine|prefill|flash|paged|ragged|^kernel$",
    "collectives": r"nccl|all_?reduce|all_?gather|reduce_?scatter|permute",
    "products": r"gemm|nvjet|cutlass|dot|cublas|wgmma|splitK",
    "copies": r"memcpy|memset|copy|transpose",
    "sampling": r"argmax|sort|top_?k|rng|threefry",
}


class Event(NamedTuple):
    name: str
    start: float  # nanoseconds
    length: float


def read(folder: Path) -> dict[str, list[Event]]:
    """-> the events of each plane ("/device:GPU:0", "/host:CPU"). Errors: ValueError if there is no trace."""
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise ValueError(f"{folder}: no *.xplane.pb below it")
    planes: dict[str, list[Event]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        streams: Iterable[Any] = [line for line in plane.lines if _counts(plane.name, line.name)]
        planes[plane.name] = [Event(e.name, e.start_ns, e.duration_ns) for line in streams for e in line.events]
    return planes


def _counts(plane: str, line: str) -> bool:
    """A device's own streams, not what was derived from them; all of the host's threads."""
    return line.startswith("Stream") if "device:GPU" in plane else True


def busy(events: list[Event]) -> float:
    """-> nanoseconds in which at least one event ran."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(event.start + event.length - max(event.start, end), 0.0)
        end = max(end, event.start + event.length)
    return total


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def totals(events: list[Event], key: Any) -> list[tuple[str, int, float]]:
    """-> (key, number of events, nanoseconds), the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        found[key(event.name)].append(event.length)
    return sorted(((name, len(times), sum(times)) for name, times in found.items()), key=lambda row: -row[2])


def show(title: str, rows: list[tuple[str, int, float]], span: float) -> None:
    print(f"\n{title:70} {'count':>8} {'ms':>10} {'us each':>9} {'share':>7}")
    for name, count, length in rows:
        print(f"{name[:70]:70} {count:8} {length / 1e6:10.3f} {length / 1e3 / count:9.1f} {length / span:7.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--top", type=int, default=25)
    options = parser.parse_args()
    without_number = lambda name: re.sub(r"[._]\d+$", "", name)
    for plane, events in read(options.folder).items():
        if not events or not plane.startswith(("/device", "/host:CPU")):
            continue
        span = max(e.start + e.length for e in events) - min(e.start for e in events)
        print(f"\n== {plane}: {span / 1e6:.1f} ms, busy {busy(events) / span:.1%}")
        if plane.startswith("/device"):
            show("kind", totals(events, kind_of), span)
        show("name", totals(events, without_number)[: options.top], span)


if __name__ == "__main__":
    main()
