"""From process start to ready, with an empty compile cache and with a warm one.

    python scripts/bench_startup.py --shape llama-8b | --model FOLDER [--out startup.json] [--settings JSON]

Each time is that of a whole process: interpreter, imports, device, weights (random for a --shape), compiling, KV cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_offline import SHAPES

PROGRAM = """
import sys, json
from engine import LLM
llm = LLM(**json.loads(sys.argv[1]))
print("ready", flush=True)
"""


def seconds_to_ready(settings: dict) -> float:
    """-> seconds. Errors: RuntimeError if the engine doesn't start."""
    started = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = any(line.strip() == "ready" for line in iter(process.stdout.readline, ""))
        elapsed = time.perf_counter() - started
    if not ready:
        raise RuntimeError("the engine did not start; its messages are above")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model")
    which.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--settings", default="{}", help="JSON: more of EngineConfig's settings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        settings = dict(model=options.model or scratch, max_model_len=4096, compilation_cache_dir=f"{scratch}/cache")
        if options.shape:
            (Path(scratch) / "config.json").write_text(json.dumps(SHAPES[options.shape]))
            settings["load_format"] = "dummy"
        settings |= json.loads(options.settings)
        figures = {name: seconds_to_ready(settings) for name in ("empty_cache_s", "warm_cache_s")}
    for name, value in figures.items():
        print(f"{options.shape or options.model}: {name} {value:.1f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
