"""Finds the settings of a server that serve the most requests a second within a bound on latency.

    python scripts/auto_tune.py --model MODEL --input-len 1800 --output-len 20 --max-model-len 2048 \
        --max-latency-allowed-ms 500 --num-seqs-list 128 256 --num-batched-tokens-list 512 1024 2048 4096

For each max_num_seqs and max_num_batched_tokens a server of its own: first all requests come at once; if the p99 of
their end-to-end latency is over the bound, the rate is searched downwards (halving the interval, then once more for
certainty), with the prefix cache emptied between. The best serves once more with the profiler on. Everything goes into
--result-dir as it comes (results.jsonl, results.csv, summary.json, heat_map.png); the same command goes on where it was
stopped.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import flags

from engine.bench import serve
from engine.bench.client import HttpClient, parse_url
from engine.bench.plots import check
from engine.bench.rate_search import SEARCHES
from engine.bench.server_process import ServerProcess, StartFailed
from engine.bench.tuning import (
    Outcome,
    Point,
    Record,
    Trial,
    TuningJournal,
    Workload,
    best_of,
    csv_of,
    draw_heat_map,
    grid,
    replace_file,
    report,
)  # fmt: skip
from engine.command_line import parse, usage

LISTS = ("num_seqs_list", "num_batched_tokens_list")


def define(values: flags.FlagValues) -> None:
    """Define the program's flags: the inputs of vLLM's auto_tune.sh, and a few more."""
    integer, string, number = flags.DEFINE_integer, flags.DEFINE_string, flags.DEFINE_float
    at: Any = {"flag_values": values}
    string("model", None, "The model to serve.", **at)
    integer("tensor_parallel_size", 1, "Devices that share each layer.", lower_bound=1, **at)
    integer("input_len", 4000, "Tokens of a prompt.", lower_bound=1, **at)
    integer("output_len", 16, "Tokens to generate.", lower_bound=1, **at)
    integer("max_model_len", 4096, "The server's longest sequence.", lower_bound=1, **at)
    integer(
        "min_cache_hit_pct", 0, "Share of a prompt, in %, that all begin with.", lower_bound=0, upper_bound=99, **at
    )
    number("max_latency_allowed_ms", 1e11, "Bound on the p99 of end-to-end latency.", lower_bound=0, **at)
    flags.DEFINE_multi_string("num_seqs_list", ["128 256"], "Values of max_num_seqs to try.", **at)
    text = "Values of max_num_batched_tokens to try."
    flags.DEFINE_multi_string("num_batched_tokens_list", ["512 1024 2048 4096"], text, **at)
    integer("num_prompts", 1000, "Requests of the run in which all come at once.", lower_bound=2, **at)
    integer("num_prompts_search", 100, "Requests of each run at a rate.", lower_bound=2, **at)
    number("precision", 0.05, "Of the rate, as a share of the highest.", lower_bound=0.001, upper_bound=0.5, **at)
    flags.DEFINE_enum("search", "binary", list(SEARCHES), "How the rate is searched; linear tries every step.", **at)
    number("start_timeout", 1800.0, "Seconds for a server to be ready.", lower_bound=1, **at)
    string("server_args", "", "More flags for the server, as on its command line.", **at)
    string("result_dir", "auto_tune", "Folder of the results; another workload may share it.", **at)


def read_workload(values: flags.FlagValues) -> tuple[Workload, list[Point]]:
    """-> what is asked, and the grid. Errors: ValueError that names the flag."""
    if values.model is None:
        raise ValueError("model: name it with --model")
    lists = []
    for name in LISTS:
        try:
            lists.append([int(word) for text in values[name].value for word in text.replace(",", " ").split()])
        except ValueError:
            raise ValueError(f"{name}: must be whole numbers, got {values[name].value}") from None
        if not lists[-1] or min(lists[-1]) < 1:
            raise ValueError(f"{name}: must be at least one positive number, got {values[name].value}")
    names = [name for name in Workload.__dataclass_fields__ if name != "server_args"]
    settings = {name: values[name].value for name in names}
    workload = Workload(**settings, server_args=tuple(shlex.split(values.server_args)))
    workload.check()
    points = list(grid(*lists))
    if not points:
        raise ValueError("num_batched_tokens_list: every value is less than every max_num_seqs")
    return workload, points


def server_command(workload: Workload, point: Point, utilization: float | None, port: int) -> list[str]:
    """-> the command that serves a point of the grid."""
    settings: dict[str, Any] = {"model": workload.model, "port": port, "max_model_len": workload.max_model_len}
    settings |= asdict(point)
    if workload.num_prompts > 1000:
        settings["max_queue"] = workload.num_prompts  # they all come at once
    if workload.tensor_parallel_size != 1:
        settings["tensor_parallel_size"] = workload.tensor_parallel_size
    if utilization is not None:
        settings["gpu_memory_utilization"] = utilization
    own = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "engine.serve", *own, *workload.server_args]


def computed_utilization() -> float | None:
    """-> what the engine computes that --gpu-memory-utilization can be at most. Errors: ValueError."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "memory.json"
        done = subprocess.run([sys.executable, "-m", "engine.bench", "memory", f"--output-json={out}"], check=False)
        if done.returncode:
            raise ValueError("gpu_memory_utilization: the device could not be asked; its message is above")
        return json.loads(out.read_text())["gpu_memory_utilization"]


def run_load(workload: Workload, port: int, rate: float | None, attempt: int, count: int, profile: bool) -> Trial:
    """-> what came of `count` requests at a rate. Errors: ValueError, if the server cannot be reached."""
    shared = workload.input_len * workload.min_cache_hit_pct // 100
    values = flags.FlagValues()
    serve.define(values)
    arguments = dict(
        port=port, host="127.0.0.1", num_prompts=count, request_rate="inf" if rate is None else rate, seed=attempt,
        random_input_len=workload.input_len - shared, random_prefix_len=shared, random_output_len=workload.output_len,
        request_timeout=max(60.0, 20 * workload.max_latency_allowed_ms / 1000), tokenizer=workload.model,
    )  # fmt: skip
    bound = workload.max_latency_allowed_ms
    given = [f"--{name}={value}" for name, value in arguments.items()]
    given += ["--ignore-eos", f"--goodput=e2el:{bound}", *(["--profile"] if profile else [])]
    parse(values, ["bench", *given], serve.SEVERAL)
    (run,) = asyncio.run(serve.bench(values, serve.read_settings(values)))
    found = run.report
    passed = not found["failed"] and found["p99_e2el_ms"] <= bound
    same = {name: found[name] for name in Trial.__dataclass_fields__ if name in found}
    return Trial(rate=rate, attempt=attempt, passed=passed, **same)


def reset_prefix_cache(port: int) -> None:
    """Errors: ValueError."""

    async def post() -> tuple[int, bytes]:
        client = HttpClient(parse_url(f"http://127.0.0.1:{port}"))
        try:
            return await client.post("/reset_prefix_cache")
        finally:
            client.close()

    status, body = asyncio.run(post())
    if status != 200:
        raise ValueError(f"the prefix cache could not be emptied: {body[:500].decode(errors='replace')}")


class Tuner:
    """Walks the grid. A server is started when a result is needed that the journal lacks."""

    def __init__(self, workload: Workload, journal: TuningJournal, folder: Path, start_timeout: float):
        self.workload, self.journal, self.folder, self.start_timeout = workload, journal, folder, start_timeout
        self.utilization = computed_utilization()
        self._server: ServerProcess | None = None

    def outcome(self, point: Point) -> Outcome:
        """-> what comes of one point of the grid."""
        key = self.workload.key(point)
        try:
            best = self._best(lambda rate, attempt: self._measure(key, point, rate, attempt))
        except (StartFailed, ValueError, OSError) as error:
            return Outcome(point, "failed", str(error))
        finally:
            self._stop()
        if best is None:
            bound = self.workload.max_latency_allowed_ms
            return Outcome(point, "bound missed", f"no rate keeps the p99 within {bound:g} ms")
        return Outcome(point, "ok", best=best)

    def _best(self, measure: Callable[[float | None, int], Trial]) -> Trial | None:
        first = measure(None, 0)
        if first.passed:
            return first
        if not first.request_throughput:
            raise ValueError("every request failed; the server's log says why")
        search = SEARCHES[self.workload.search]
        return search(measure, first.request_throughput, self.workload.precision)

    def _measure(self, key: str, point: Point, rate: float | None, attempt: int) -> Trial:
        known = self.journal.trials.get((key, rate, attempt))
        if known is not None:
            return known
        if self._server is None:
            command = server_command(self.workload, point, self.utilization, 0)
            log = self.folder / f"server-{point.max_num_seqs}-{point.max_num_batched_tokens}.log"
            say(f"starting {point}")
            self._server = ServerProcess(command, log, self.start_timeout)
        reset_prefix_cache(self._server.port)
        count = self.workload.num_prompts if rate is None else self.workload.num_prompts_search
        trial = run_load(self.workload, self._server.port, rate, attempt, count, False)
        if not self._server.is_alive():
            raise ValueError(f"the server died; {self._server.log} says why")
        verdict = "passes" if trial.passed else "fails"
        shown = "inf" if rate is None else f"{rate:.2f}"
        say(f"rate {shown}: {trial.request_throughput:.2f} req/s, p99 {trial.p99_e2el_ms:.0f} ms, {verdict}")
        self.journal.add(Record(key, trial=trial))
        return trial

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def profile(self, outcome: Outcome) -> Path:
        """Serve the best point once more, at its rate, with the profiler on. -> the folder of the trace."""
        assert outcome.best is not None
        folder = self.folder / "profile"
        command = [*server_command(self.workload, outcome.point, self.utilization, 0), f"--profile-dir={folder}"]
        with ServerProcess(command, self.folder / "server-profile.log", self.start_timeout) as server:
            count = min(self.workload.num_prompts_search, 20)  # a trace of more is too large to look at
            run_load(self.workload, server.port, outcome.best.rate, 2, count, True)
        return folder


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def tune(workload: Workload, points: list[Point], folder: Path, start_timeout: float) -> Outcome | None:
    """Walk the grid and write what is found. -> the best outcome. Errors: ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    with TuningJournal(folder / "results.jsonl") as journal:
        tuner = Tuner(workload, journal, folder, start_timeout)
        outcomes = []
        for point in points:
            key = workload.key(point)
            if key not in journal.outcomes:
                outcome = tuner.outcome(point)
                journal.add(Record(key, outcome=outcome))
                say(f"{point}: {outcome.status}, {outcome.throughput:.2f} req/s {outcome.reason}")
            outcomes.append(journal.outcomes[key])
            replace_file(folder / "results.csv", csv_of(outcomes))
    best = best_of(outcomes)
    summary: dict[str, Any] = {"workload": asdict(workload), "outcomes": [asdict(o) for o in outcomes], "best": None}
    summary["gpu_memory_utilization"] = tuner.utilization
    draw_heat_map(outcomes, f"p99 end to end within {workload.max_latency_allowed_ms:g} ms", folder / "heat_map.png")
    print(report(outcomes, workload.max_latency_allowed_ms))
    if best is not None:
        command = shlex.join(["python", *server_command(workload, best.point, tuner.utilization, 8000)[1:]])
        summary |= {"best": asdict(best), "command": command}
        print(f"Best: {best.point}, {best.throughput:.2f} requests/s\n{command}")
    replace_file(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
    if best is not None:
        print(f"Profile of the best: {tuner.profile(best)}")
    return best


def main(argv: list[str]) -> int:
    """-> the exit status: 0 if something meets the bound, 3 if nothing does."""
    values = flags.FlagValues()
    define(values)
    if {"-h", "--help"} & set(argv[1:]):
        print(usage("python scripts/auto_tune.py", "the settings that serve the most within a bound", values))
        return 0
    try:
        check()
        parse(values, argv, LISTS)
        workload, points = read_workload(values)
        best = tune(workload, points, Path(values.result_dir), values.start_timeout)
    except (ValueError, StartFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0 if best is not None else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv))
