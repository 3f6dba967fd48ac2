"""`python -m engine.bench startup`: from process start to ready, with an empty compile cache and with a warm one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from engine.bench.offline import PERCENTILES, define_engine, define_output, engine_settings, write_figures

PURPOSE = "how long a process takes to be ready, with an empty compile cache and with a warm one"

PROGRAM = """
import sys, json
from engine import LLM
llm = LLM(**json.loads(sys.argv[1]))
print("ready", flush=True)
"""


def define(values: flags.FlagValues) -> None:
    define_engine(values)
    integer = flags.DEFINE_integer
    integer("num_iters_cold", 3, "Starts with an empty compile cache.", lower_bound=1, flag_values=values)
    integer("num_iters_warmup", 0, "Starts with a warm cache that do not count.", lower_bound=0, flag_values=values)
    integer("num_iters_warm", 3, "Starts with a warm cache.", lower_bound=1, flag_values=values)
    define_output(values)


def seconds_to_ready(settings: dict[str, Any]) -> float:
    """-> seconds of a whole process: interpreter, imports, device, weights, compiling, KV cache. Errors: ValueError."""
    started = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = any(line.strip() == "ready" for line in iter(process.stdout.readline, ""))
        elapsed = time.perf_counter() - started
    if not ready:
        raise ValueError("the engine did not start; its messages are above")
    return elapsed


def main(values: flags.FlagValues) -> None:
    """Run the command. Errors: ValueError."""
    if values.compilation_cache_dir is not None:
        raise ValueError("compilation_cache_dir: the benchmark makes its own, which is empty; leave it out")
    with tempfile.TemporaryDirectory() as scratch:
        settings = engine_settings(values, Path(scratch))

        def start(cache: str) -> float:
            return seconds_to_ready(settings | {"compilation_cache_dir": f"{scratch}/{cache}"})

        cold = [start(f"cold-{i}") for i in tqdm(range(values.num_iters_cold), desc="cold starts", disable=None)]
        for _ in range(values.num_iters_warmup):
            start("cold-0")
        warm = [start("cold-0") for _ in tqdm(range(values.num_iters_warm), desc="warm starts", disable=None)]
    figures: dict[str, Any] = {}
    for name, times in (("cold", cold), ("warm", warm)):
        figures[f"avg_{name}_startup_time"] = float(np.mean(times))
        figures[f"{name}_startup_times"] = times
        shown = np.percentile(times, PERCENTILES).tolist()
        figures[f"{name}_startup_percentiles"] = dict(zip(PERCENTILES, shown, strict=True))
        print(f"{name}: {np.mean(times):.1f} s on average, {min(times):.1f} s at best, of {len(times)} starts")
    write_figures(values, figures)
