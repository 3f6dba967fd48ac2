"""A profiler trace as a table: what the device did, by kind and by kernel, how long it was idle, and the host's part.

    python scripts/profile_summary.py FOLDER [--top 25]

FOLDER is what a profile was written to (--profile-dir, `bench_offline.py --profile FOLDER`). An operation's kind is
told by the named scope that it was traced in, which the trace keeps beside it, else by its name; what neither tells
counts as "other". On a CPU operations run on the host's threads, side by side: their times may add up to more than the
time that passed.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

SCOPES = {  # parts of an operation's path in the program: the first that matches
    "attention": r"/attend/",
    "products": r"dot_general|ragged_dot|/logits/|/experts/",
    "sampling": r"/(sample|prompt_logprobs)/",
}
NAMES = {  # for kernels whose path is not known
    "attention": r"attend|combine|prefill|flash|paged|ragged|^kernel$",
    "collectives": r"nccl|all[-_]?reduce|all[-_]?gather|reduce[-_]?scatter|permute|all[-_]?to[-_]?all",
    "products": r"gemm|nvjet|cutlass|dot|cublas|wgmma|splitK",
    "copies": r"memcpy|memset|copy|transpose",
    "sampling": r"argmax|sort|top_?k|rng|threefry",
}
CONTAINERS = re.compile(r"(while|cond|conditional|call)\b")  # what is in them has events of its own


class Event(NamedTuple):
    name: str
    start: float  # nanoseconds
    length: float
    path: str = ""  # where in the program it was traced: "jit(step)/attention/attend/…"; empty if that is not known


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each field of a protobuf message: an int, or bytes. Fixed-size fields are skipped."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        match key & 7:
            case 0:
                yield key >> 3, varint()
            case 2:
                size = varint()
                yield key >> 3, data[at : at + size]
                at += size
            case 1 | 5 as kind:
                at += 8 if kind == 1 else 4
            case kind:
                raise ValueError(f"not a profile: a protobuf field of kind {kind}")


def only(data: bytes, number: int) -> Iterator[Any]:
    """Yields the values of one field."""
    return (value for found, value in fields(data) if found == number)


def paths(profile: bytes) -> dict[tuple[int, str], str]:
    """-> by program and operation, where it was traced. From the HLO modules that a trace keeps in its metadata.

    Numbers of fields: tsl/profiler/protobuf/xplane.proto and xla/service/hlo.proto.
    """
    found = {}
    for plane in only(profile, 1):
        if b"/host:metadata" not in only(plane, 2):
            continue
        for entry in only(plane, 4):
            for about in only(entry, 2):
                program = re.search(rb"\((\d+)\)$", next(only(about, 2), b""))
                modules = [module for stat in only(about, 5) for hlo in only(stat, 6) for module in only(hlo, 1)]
                for instruction in (i for m in modules for computation in only(m, 3) for i in only(computation, 2)):
                    name = next(only(instruction, 1), b"").decode()
                    where = [path for metadata in only(instruction, 7) for path in only(metadata, 2)]
                    if program and where:
                        found[int(program[1]), name] = where[0].decode()
    return found


def read(folder: Path) -> dict[str, list[Event]]:
    """-> the events of each plane ("/device:GPU:0", "/host:CPU"), and of a CPU's operations ("/device:CPU").

    Errors: ValueError if there is no trace.
    """
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise ValueError(f"{folder}: no *.xplane.pb below it")
    data = files[-1].read_bytes()
    where = paths(data)
    planes: dict[str, list[Event]] = defaultdict(list)
    for plane in jax.profiler.ProfileData.from_serialized_xspace(data).planes:
        for line in plane.lines:
            if not _counts(plane.name, line.name):
                continue
            for e in line.events:
                stats: dict[Any, Any] = dict(e.stats)
                path = where.get((stats.get("program_id", -1), str(stats.get("hlo_op", ""))), "")
                on_cpu = plane.name == "/host:CPU" and "hlo_op" in stats
                if on_cpu and CONTAINERS.match(e.name):
                    continue
                name = "/device:CPU" if on_cpu else plane.name
                planes[name].append(Event(e.name, e.start_ns, e.duration_ns, path))
    return planes


def _counts(plane: str, line: str) -> bool:
    """A device's own streams, not what was derived from them; all of the host's threads."""
    if "device:GPU" in plane:
        return line.startswith("Stream")
    return line == "XLA Ops" if "device:TPU" in plane else True


def busy(events: list[Event]) -> float:
    """-> nanoseconds in which at least one event ran."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(event.start + event.length - max(event.start, end), 0.0)
        end = max(end, event.start + event.length)
    return total


def kind_of(event: Event) -> str:
    """-> attention, products, collectives, sampling, copies or other."""
    collective = re.search(NAMES["collectives"], event.name, re.IGNORECASE)
    if event.path and not collective:
        return next((kind for kind, pattern in SCOPES.items() if re.search(pattern, event.path)), "other")
    return next((kind for kind, pattern in NAMES.items() if re.search(pattern, event.name, re.IGNORECASE)), "other")


def totals(events: list[Event], key: Any) -> list[tuple[str, int, float]]:
    """-> (key, number of events, nanoseconds), the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        found[key(event)].append(event.length)
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
    without_number = lambda event: re.sub(r"[._]\d+$", "", event.name)
    for plane, events in read(options.folder).items():
        if not events or not plane.startswith(("/device", "/host:CPU")):
            continue
        span = max(e.start + e.length for e in events) - min(e.start for e in events)
        print(f"\n== {plane}: {span / 1e6:.1f} ms, busy {busy(events) / span:.1%}")
        if plane.startswith("/device"):
            idle = span - busy(events)
            show("kind", [*totals(events, kind_of), ("idle", 1, idle)], span)
        show("name", totals(events, without_number)[: options.top], span)


if __name__ == "__main__":
    main()
