"""A search that any number of devices share, that can be stopped and goes on: what scripts/tune_kernels.py drives.

A job is one file and one batch size. What is found is added to FILE.part as soon as it is known; when every batch size
is there, the file itself appears, at once, and the part goes. One thread alone writes, so that no worker's results are
lost to another's.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from kernels import tuned

Found = dict[str, Any]  # an entry of a file


class Job(NamedTuple):
    """One batch size of one file, and what the search needs to know of it."""

    file: str
    tokens: int
    about: Any


class Outcome(NamedTuple):
    """What became of a search: files that are complete now, jobs that failed and why, and whether it was stopped."""

    complete: list[str]
    failures: dict[tuple[str, int], str]
    stopped: bool


def search(
    jobs: Sequence[Job],
    workers: Sequence[Any],
    find: Callable[[Job, Any, threading.Event], Found],
    folder: Path,
    *,
    wanted: Sequence[int] = tuned.BATCH_SIZES,
    quiet: bool = False,
) -> Outcome:
    """Give every job to the next worker that is free, a thread for each of `workers`, and write what they find.

    find(job, worker, stop) -> the entry; it may raise, and should return soon once `stop` is set. Jobs whose entry is
    in a file or its part are not done again. A file is complete when it has all batch sizes of `wanted`: of fewer, one
    far away would be taken for the nearest. Ctrl-C stops the workers and leaves the parts to a later run.
    """
    tables = {job.file: _begun(folder / job.file) for job in jobs}
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    left = [job for job in jobs if job.tokens not in tables[job.file]]
    for job in left:
        waiting.put(job)
    results: queue.SimpleQueue[tuple[Job, Found | Exception]] = queue.SimpleQueue()
    stop = threading.Event()

    def work(worker: Any) -> None:
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((job, find(job, worker, stop)))
            except Exception as error:
                results.put((job, error))

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    complete = [name for name, table in tables.items() if _finish(folder / name, table, wanted)]
    failures: dict[tuple[str, int], str] = {}
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="batch", disable=quiet, file=sys.stderr) as bar:
        for thread in threads:
            thread.start()
        try:
            for _ in left:
                job, found = _next(results, threads)
                bar.update()
                bar.set_postfix_str(f"{job.file[:40]} {job.tokens}")
                if isinstance(found, Exception):
                    failures[job.file, job.tokens] = f"{type(found).__name__}: {found}"
                    continue
                table = tables[job.file]
                table[job.tokens] = found
                tuned.write(_part(folder / job.file), table)
                if _finish(folder / job.file, table, wanted):
                    complete.append(job.file)
        except KeyboardInterrupt:
            stop.set()
    for thread in threads:
        thread.join()
    return Outcome(complete, failures, stop.is_set())


def _next(results: queue.SimpleQueue[Any], threads: Sequence[threading.Thread]) -> Any:
    """-> the next result. In turns, since a wait without an end would not notice Ctrl-C everywhere."""
    while True:
        try:
            return results.get(timeout=0.2)
        except queue.Empty:
            assert any(thread.is_alive() for thread in threads) or not results.empty()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _begun(path: Path) -> dict[int, Found]:
    """-> the entries that earlier runs left in a file or its part; a part that is no JSON is begun anew."""
    table: dict[int, Found] = {}
    for place in (path, _part(path)):
        if place.exists():
            try:
                table |= tuned.read(place)
            except (ValueError, json.JSONDecodeError):
                print(f"{place} cannot be read: begun anew", file=sys.stderr)
    return table


def _finish(path: Path, table: dict[int, Found], wanted: Sequence[int]) -> bool:
    """-> whether all is found; then the file is written, and its part removed."""
    if not set(wanted) <= table.keys():
        return False
    tuned.write(path, table)
    _part(path).unlink(missing_ok=True)
    return True
