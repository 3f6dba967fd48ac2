"""The auto-tuner: its search, its journal, servers that start, fail and are ended, and a walk that is cut off."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest

from engine.bench.rate_search import binary, linear
from engine.bench.server_process import ServerProcess, StartFailed
from engine.bench.tuning import Outcome, Point, Record, Trial, TuningJournal, best_of, csv_of, grid, report

ROOT = pathlib.Path(__file__).parents[3]


def trial(rate: float | None, attempt: int = 0, passed: bool = True, throughput: float | None = None) -> Trial:
    served = throughput if throughput is not None else rate or 10.0
    return Trial(rate, attempt, passed, 50.0 if passed else 900.0, 10.0, 2.0, served, served, served * 16, 0)


# The search


@pytest.mark.parametrize("limit", [0.3, 1.0, 3.3, 7.9, 9.99])
@pytest.mark.parametrize("search", [binary, linear])
def test_the_highest_rate_that_passes_is_found(search, limit):
    tried = []

    def measure(rate: float, attempt: int) -> Trial:
        tried.append(rate)
        return trial(rate, attempt, rate <= limit)

    found = search(measure, 10.0, 0.02)
    assert found is not None
    assert limit - 0.2 <= found.rate <= limit
    assert search is linear or len(tried) <= 8


@pytest.mark.parametrize("search", [binary, linear])
def test_nothing_is_found_where_nothing_passes(search):
    assert search(lambda rate, attempt: trial(rate, attempt, False), 10.0, 0.05) is None


def test_the_ceiling_itself_may_pass():
    tried = []
    found = binary(lambda rate, attempt: tried.append(rate) or trial(rate, attempt), 10.0, 0.05)
    assert found is not None
    assert (found.rate, tried) == (10.0, [10.0, 10.0])


def test_a_rate_that_passes_once_only_is_not_believed():
    def measure(rate: float, attempt: int) -> Trial:
        return trial(rate, attempt, rate <= (8.0 if attempt == 0 else 4.0))

    found = binary(measure, 10.0, 0.02)
    assert found is not None
    assert 3.8 <= found.rate <= 4.0


# The journal and the tables


def test_results_are_there_when_the_journal_is_opened_again(tmp_path):
    path = tmp_path / "results.jsonl"
    with TuningJournal(path) as journal:
        journal.add(Record("a", trial=trial(None)))
        journal.add(Record("a", trial=trial(2.5, 1, False)))
        journal.add(Record("a", outcome=Outcome(Point(4, 8), "ok", best=trial(2.0))))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "b", "tri')  # as a killed process leaves it
    with TuningJournal(path) as again:
        pass
    assert (again.trials, again.outcomes) == (journal.trials, journal.outcomes)
    assert path.read_bytes() == whole
    path.write_text("else\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:1: not a result"):
        TuningJournal(path)


def test_the_best_has_the_highest_throughput_within_the_bound():
    outcomes = [
        Outcome(Point(4, 8), "ok", best=trial(2.0)),
        Outcome(Point(8, 8), "ok", best=trial(None, throughput=3.0)),
        Outcome(Point(8, 16), "failed", "max_model_len: no room"),
    ]
    assert best_of(outcomes) is outcomes[1]
    rows = csv_of(outcomes).splitlines()
    assert rows[1].startswith("4,8,ok,2.0,")
    assert rows[2].startswith("8,8,ok,inf,")
    assert rows[3].endswith("max_model_len: no room")
    assert best_of(outcomes[2:]) is None
    assert "No point of the grid keeps the p99 of end-to-end latency within 5 ms" in report(outcomes[2:], 5.0)


def test_points_that_the_engine_refuses_are_left_out():
    assert list(grid([4, 16], [8, 32])) == [Point(4, 8), Point(4, 32), Point(16, 32)]


# Servers

READY = (
    "import sys, time; print('quire: listening on http://127.0.0.1:4711, loading the model\\nquire: ready', flush=True)"
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_is_ended_with_all_that_it_started(tmp_path):
    child = f"import subprocess; p = subprocess.Popen({python('import time; time.sleep(600)')!r}); print('pid', p.pid)"
    with ServerProcess(python(f"{child}; {READY}; time.sleep(600)"), tmp_path / "log", 60) as server:
        assert server.port == 4711
        assert server.is_alive()
        pid = int((tmp_path / "log").read_text().split()[1])
        assert is_running(pid)
    assert not server.is_alive()
    wait_for(lambda: not is_running(pid))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print('quire: the engine has failed: ValueError: no room', flush=True); exit(1)", "^ValueError: no room$"),
        ("exit(3)", "ended with status 3"),
        ("import time; time.sleep(600)", "not ready after"),
    ],
)
def test_a_server_that_does_not_start_says_why(tmp_path, code, told):
    with pytest.raises(StartFailed, match=told):
        ServerProcess(python(code), tmp_path / "log", 1.0 if "sleep" in code else 60.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_server_ends_when_its_owner_is_killed(tmp_path):
    owner = (
        "import os, pathlib, sys, time; from engine.bench.server_process import ServerProcess\n"
        f"server = ServerProcess({python(f'{READY}; time.sleep(600)')!r}, pathlib.Path(sys.argv[1]), 60)\n"
        "print(server._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([*python(owner), str(tmp_path / "log")], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_running(pid)
        process.kill()
    wait_for(lambda: not is_running(pid))


# The walk


@pytest.fixture
def auto_tune(monkeypatch):
    """The script, with a server whose p99 grows with the rate. `calls` collects what was run."""
    spec = importlib.util.spec_from_file_location("auto_tune", ROOT / "scripts" / "auto_tune.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.calls = []
    script.stop_after = 10**6

    class Server:
        def __init__(self, command: list[str], log: pathlib.Path, timeout: float):
            self.port, self.log = command, log
            script.calls.append("start")
            if "--max-num-seqs=64" in command:
                raise StartFailed("max_model_len: no room for 64")

        def __enter__(self):
            return self

        def __exit__(self, *exception: object) -> None: ...

        def is_alive(self) -> bool:
            return True

        def stop(self) -> None:
            script.calls.append("stop")

    def run_load(workload: Any, port: Any, rate: float | None, attempt: int, count: int, profile: bool) -> Trial:
        if len([call for call in script.calls if isinstance(call, tuple)]) >= script.stop_after:
            raise KeyboardInterrupt
        script.calls.append((rate, attempt, count, profile))
        seqs = int(next(a for a in port if a.startswith("--max-num-seqs=")).partition("=")[2])
        p99 = 5000.0 if rate is None else 100 * rate / seqs**0.5
        served = float(seqs) if rate is None else rate
        return Trial(rate, attempt, p99 <= workload.max_latency_allowed_ms, p99, 1.0, 1.0, served, 0.0, 0.0, 0)

    monkeypatch.setattr(script, "ServerProcess", Server)
    monkeypatch.setattr(script, "run_load", run_load)
    monkeypatch.setattr(script, "reset_prefix_cache", lambda port: script.calls.append("reset"))
    monkeypatch.setattr(script, "computed_utilization", lambda: 0.97)
    return script


ASKED = [
    "--model=m",
    "--input-len=10",
    "--output-len=4",
    "--num-seqs-list",
    "4",
    "16",
    "--num-batched-tokens-list",
    "16 32",
]


def test_a_walk_finds_the_best_and_says_how_to_run_it(auto_tune, tmp_path, capsys):
    assert auto_tune.main(["auto_tune", *ASKED, f"--result-dir={tmp_path}", "--max-latency-allowed-ms=200"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    best = summary["best"]
    assert best["point"]["max_num_seqs"] == 16
    assert best["best"]["rate"] == pytest.approx(8.0, abs=0.8)  # 100 rate / 4 <= 200
    assert "--max-num-seqs=16" in summary["command"]
    assert "--gpu-memory-utilization=0.97" in summary["command"]
    assert summary["command"] in capsys.readouterr().out
    assert (tmp_path / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 5
    runs = [call for call in auto_tune.calls if isinstance(call, tuple)]
    assert runs[-1] == (best["best"]["rate"], 2, 20, True)  # profiled, at its rate
    assert auto_tune.calls.count("reset") == len(runs) - 1
    assert auto_tune.calls.count("start") == 5


def test_a_walk_that_was_cut_off_goes_on_and_repeats_nothing(auto_tune, tmp_path):
    command = ["auto_tune", *ASKED, "--max-latency-allowed-ms=200"]
    auto_tune.main([*command, f"--result-dir={tmp_path}/whole"])
    whole = [call for call in auto_tune.calls if isinstance(call, tuple)]
    auto_tune.calls.clear()
    for stop in (3, 9, 10**6):
        auto_tune.stop_after = stop
        auto_tune.main([*command, f"--result-dir={tmp_path}/cut"])
    assert [call for call in auto_tune.calls if isinstance(call, tuple)] == whole
    for name in ("summary.json", "results.csv", "results.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_server_that_fails_to_start_is_recorded_and_the_walk_goes_on(auto_tune, tmp_path):
    asked = [*ASKED, "--num-seqs-list", "64", "--num-batched-tokens-list", "64"]
    assert auto_tune.main(["auto_tune", *asked, f"--result-dir={tmp_path}", "--max-latency-allowed-ms=200"]) == 0
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert "64,64,failed" in rows[-1]
    assert rows[-1].endswith("max_model_len: no room for 64")


def test_a_bound_that_nothing_meets_is_said_plainly(auto_tune, tmp_path, capsys):
    assert auto_tune.main(["auto_tune", *ASKED, f"--result-dir={tmp_path}", "--max-latency-allowed-ms=0.001"]) == 3
    assert "No point of the grid keeps" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["best"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--input-len=4090", "--model=m"], "max_model_len: 4096 is less than input and output, 4106"),
        ([], "model: name it"),
        (["--model=m", "--num-seqs-list", "many"], "num_seqs_list: must be whole numbers"),
        (["--model=m", "--num-seqs-list=99999"], "num_batched_tokens_list: every value is less"),
    ],
)
def test_what_cannot_be_tuned_is_told(auto_tune, arguments, told, capsys):
    assert auto_tune.main(["auto_tune", *arguments]) == 1
    assert told in capsys.readouterr().err
