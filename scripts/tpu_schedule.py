"""Reads the TPU compiler's final schedule of a kernel: its loops, how many bundles they are, and what those use.

A bundle is what one cycle issues, so a loop's bundles are its cycles per turn if nothing is waited for.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LINE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:(LB|LH|LE|PB|PF|CT)\s*)?:\s*(>*)\s*\{(\})?")


@dataclass
class Loop:
    """One loop without the loops in it."""

    depth: int
    first: int  # bundle
    bundles: int = 0
    uses: Counter[str] = field(default_factory=Counter)  # slots by unit, "VSTORE:SPILL" and the like among them
    inside: list[Loop] = field(default_factory=list)

    def share(self, unit: str, capacity: dict[str, int]) -> float:
        """-> the part of a unit's issue slots that is used."""
        return self.uses[unit] / (self.bundles * capacity[unit])


@dataclass
class Schedule:
    bundles: int
    capacity: dict[str, int]  # slots of a unit in each bundle
    loops: list[Loop]  # in order of their first bundle


def read_schedule(folder: Path, kernel: str) -> Schedule:
    """`folder`: what the compiler was told to dump to. Errors: FileNotFoundError without a schedule of that kernel."""
    finals = [p for p in folder.glob(f"*{kernel}*-final_bundles.txt") if "TLP" not in p.name and "<" not in p.name]
    if not finals:
        raise FileNotFoundError(f"{folder}: no schedule of a kernel named {kernel!r}")
    latest = max(finals, key=lambda p: p.stat().st_mtime)
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", latest.name)
    uses = next(p for p in folder.glob("*-final_hlo-static-per-bundle-utilization.txt") if p.name.startswith(stem))
    names, rows = _table(uses)
    capacity = dict(zip(names, rows[0], strict=True))
    depths = _depths(latest)
    return Schedule(len(depths), capacity, _loops(depths, names, rows[1:]))


def _table(path: Path) -> tuple[list[str], list[list[int]]]:
    """-> the units, and a row of numbers for their capacity and for each bundle."""
    lines = path.read_text().splitlines()
    rows = [[int(n) for n in line.split()] for line in lines if re.fullmatch(r"[\d\s]+", line) and line.strip()]
    return [name.strip() for name in lines[1].split(",")], rows


def _depths(path: Path) -> list[tuple[int, bool]]:
    """-> for each bundle: how many loops it is in, and whether it begins one. An empty bundle is where the last was."""
    found: list[tuple[int, bool]] = []
    for line in path.read_text().splitlines():
        if match := LINE.match(line):
            mark, arrows, empty = match.groups()
            depth = found[-1][0] if empty and not mark and found else len(arrows)
            found.append((depth, mark == "LB"))
    return found


def _loops(depths: list[tuple[int, bool]], names: list[str], rows: list[list[int]]) -> list[Loop]:
    open_loops: list[Loop] = []
    found: list[Loop] = []
    for i, (depth, begins) in enumerate(depths):
        del open_loops[depth:]
        if begins and len(open_loops) == depth and open_loops:
            open_loops.pop()
        while len(open_loops) < depth:
            loop = Loop(len(open_loops) + 1, i)
            if open_loops:
                open_loops[-1].inside.append(loop)
            open_loops.append(loop)
            found.append(loop)
        if open_loops:
            open_loops[-1].bundles += 1
            if i < len(rows):
                open_loops[-1].uses.update(dict(zip(names, rows[i], strict=True)))
    return found
