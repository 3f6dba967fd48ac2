"""The commands around the engine, on a tiny model; pictures; the command line."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from engine.bench import plots, startup
from engine.bench.__main__ import COMMANDS, main
from engine.bench.load import Load
from engine.bench.plots import pareto
from engine.bench.requests import Result
from engine.bench.serve import Run

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny" / "llama3"
SMALL = ["--model", str(TINY), "--skip-tokenizer-init", "--max-num-seqs=2", "--max-num-batched-tokens=16"]
SMALL += ["--max-model-len=64"]


def test_throughput_counts_every_token(tmp_path, capsys):
    out, traces = tmp_path / "out.json", tmp_path / "traces"
    asked = ["--num-prompts=5", "--input-len=12", "--output-len=4", "--profile", f"--profile-dir={traces}"]
    assert main(["bench", "throughput", *SMALL, *asked, f"--output-json={out}"]) == 0
    figures = json.loads(out.read_text())
    assert (figures["num_requests"], figures["total_num_tokens"], figures["total_output_tokens"]) == (5, 80, 20)
    assert figures["tokens_per_second"] == pytest.approx(80 / figures["elapsed_time"])
    assert figures["requests_per_second"] == pytest.approx(5 / figures["elapsed_time"])
    assert "Throughput: " in capsys.readouterr().out
    assert list(traces.rglob("*.xplane.pb"))
    assert list(traces.rglob("perfetto_trace.json.gz"))


def test_latency_reports_each_batch(tmp_path):
    out = tmp_path / "out.json"
    asked = ["--batch-size=2", "--input-len=8", "--output-len=4", "--num-iters-warmup=1", "--num-iters=3"]
    assert main(["bench", "latency", *SMALL, *asked, f"--output-json={out}"]) == 0
    figures = json.loads(out.read_text())
    assert set(figures) == {"avg_latency", "latencies", "percentiles"}
    assert figures["avg_latency"] == pytest.approx(np.mean(figures["latencies"]))
    assert len(figures["latencies"]) == 3
    assert figures["percentiles"]["50"] == pytest.approx(np.median(figures["latencies"]))


# Stands for an engine: quick where its cache is there already, and refusing a sequence of one token.
ENGINE = """
import json, os, sys, time
settings = json.loads(sys.argv[1])
if settings["max_model_len"] == 1:
    sys.exit("too short")
if not os.path.exists(settings["compilation_cache_dir"]):
    time.sleep(1.5)
    os.makedirs(settings["compilation_cache_dir"])
print("ready")
"""


def test_startup_compares_empty_caches_with_a_warm_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(startup, "PROGRAM", ENGINE)
    out = tmp_path / "out.json"
    asked = ["--num-iters-cold=2", "--num-iters-warm=2", f"--output-json={out}"]
    assert main(["bench", "startup", *SMALL, *asked]) == 0
    figures = json.loads(out.read_text())
    assert min(figures["cold_startup_times"]) > min(figures["warm_startup_times"]) > 0
    assert figures["avg_cold_startup_time"] == pytest.approx(np.mean(figures["cold_startup_times"]))
    assert main(["bench", "startup", *SMALL, "--max-model-len=1"]) == 1
    assert "the engine did not start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["throughput"], "model: name a model"),
        (["throughput", "--model=x", "--shape=llama-8b"], "shape: stands for a model"),
        (["latency", "--shape=no-such"], "shape"),
        (["throughput", "--model=/no/such/folder"], "/no/such/folder"),
        (["startup", "--shape=llama-8b", "--compilation-cache-dir=x"], "compilation_cache_dir"),
        (["serve", "--port=1", "--ready-check-timeout-sec=0"], "base_url: 127.0.0.1:1 is not ready"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(arguments, told, capsys):
    assert main(["bench", *arguments]) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: ")
    assert told in shown


def test_help_lists_commands_and_their_flags(capsys):
    assert main(["bench"]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert main(["bench", "serve", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--request-rate (default: inf)" in shown
    assert "One of random, sharegpt" in shown


def make_run(rate: float, tpot: float) -> Run:
    results = [Result(8, 5, start=i / 10, ttft=0.1, latency=0.1 + 4 * tpot, itl=[tpot] * 4) for i in range(10)]
    results.append(Result(start=0.5, error="HTTP 429"))
    report = {"date": "20260101-000000", "request_throughput": min(rate, 9.0), "output_throughput": min(rate, 9.0) * 5}
    return Run(rate, report, Load(results, 2.0, np.zeros(11), 0.1))


def test_a_sweep_is_drawn_as_pictures(tmp_path):
    paths = plots.draw([make_run(2.0, 0.01), make_run(8.0, 0.02), make_run(float("inf"), 0.05)], tmp_path)
    assert len(paths) == len(set(paths)) == 8
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_only_what_no_other_beats_is_on_the_front():
    assert pareto([(1.0, 9.0), (3.0, 5.0), (2.0, 4.0), (5.0, 1.0), (4.0, 1.0)]) == [3, 1, 0]
