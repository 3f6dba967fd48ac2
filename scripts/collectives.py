"""What a compiled step does between devices, read from XLA's text of it: every collective, and a pipeline's turns."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "s64": 8}
OF_JAX = ("while", "body", "closed_call", "eval_jaxpr", "shard_map")  # scopes that no part of a step is called
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


class Collective(NamedTuple):
    """`shape`: of what one device puts in or gets, whichever is more, e.g. "bf16[256,8192]". `scope`: whose it is in
    the step, e.g. "mlp", or "" where the compiler does not say."""

    kind: str
    shape: str
    scope: str

    @property
    def bytes(self) -> int:
        return size_of(self.shape)


def collectives(text: str) -> Counter[Collective]:
    """-> how often one call of the program does each. Errors: ValueError for one in a loop of unknown length."""
    parts = _computations(text)
    times = _times(parts)
    found: Counter[Collective] = Counter()
    for name, body in parts.items():
        for line in body.splitlines():
            match = re.search(rf"= (\(?\w+\[.*?) ({KINDS})(?:-start)?\(", line)
            if match is None or not (count := times.get(name, 0)):
                continue
            if count < 0:
                raise ValueError(
                    f"{name}: has a collective in a loop whose length the program does not say: {line:.200}"
                )
            shapes = [f"{dtype}[{sizes}]" for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]
            scope = re.search(r'op_name="([^"]*)"', line)
            found[Collective(match[2], max(shapes, key=size_of), _scope(scope[1] if scope else ""))] += count
    return found


def turns(text: str) -> int:
    """-> how often the loop goes round that hands micro-batches from stage to stage; 1 if there is none."""
    parts = _computations(text)
    found = {
        int(count)
        for name in parts
        for loop, count in _loops(parts, name).items()
        if count and "collective-permute" in parts[loop]
    }
    assert len(found) <= 1, found
    return found.pop() if found else 1


def size_of(shape: str) -> int:
    """-> bytes of e.g. "bf16[256,8192]"."""
    dtype, sizes = shape.rstrip("]").split("[")
    return BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)


def _scope(name: str) -> str:
    """-> of an operation's full name the last part but the operation itself that names a scope of the step's."""
    inner = [part for part in name.split("/")[:-1] if re.fullmatch(r"[a-z_]+", part)]
    return next((part for part in reversed(inner) if part not in OF_JAX), "")


def _computations(text: str) -> dict[str, str]:
    """-> the text of each computation by its name; the program's own is "ENTRY"."""
    found = {}
    for part in re.split(r"\n(?=(?:ENTRY )?%[\w.-]+ )", text):
        head = re.match(r"(ENTRY )?%([\w.-]+) ", part)
        if head:
            found["ENTRY" if head[1] else head[2]] = part
    return found


def _loops(parts: dict[str, str], name: str) -> dict[str, int | None]:
    """-> for each loop of a computation the name of its body, and how often it goes round, if that is known.

    XLA's CPU compiler writes that down; the TPU's leaves a counter, from 0 on, that is compared with a constant.
    """
    found = {}
    for line in parts[name].splitlines():
        if loop := re.search(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line):
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            condition = parts[loop[1]]
            ends = re.findall(r"= s32\[\]\S* constant\((\d+)\)", condition)
            if not count and len(ends) == 1 and re.search(r"ROOT .*compare\(.*direction=LT", condition):
                count = re.search(r"constant\((\d+)\)", condition)
            found[loop[2]] = int(count[1]) if count else None
    return found


def _times(parts: dict[str, str]) -> dict[str, int]:
    """-> how often each computation runs, as far as it is known: below 0, it is not."""
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        body, loops = parts[name], _loops(parts, name)
        for called in re.findall(
            r"%([\w.-]+)",
            " ".join(re.findall(r"(?:calls|body|branch_computations|\w+_computation)=(\{[^}]*\}|%[\w.-]+)", body)),
        ):
            if called in parts:
                each = loops.get(called, 1)
                visit(called, -(1 << 20) if each is None else count * each)

    visit("ENTRY", 1)
    return times
