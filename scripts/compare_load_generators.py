"""Our load generator beside another one, aiperf, on the same server with the same prompts: do they see the same?

    python scripts/compare_load_generators.py --aiperf VENV/bin/aiperf [--url http://127.0.0.1:8000 --model NAME]

Without --url the server is one that answers after known delays. Both take turns, several times; medians of what they
report are compared. aiperf (pip install aiperf) is no dependency: it has an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def ours(options: argparse.Namespace, prompts: list[str], scratch: Path) -> dict[str, float]:
    data = scratch / "ours.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "output_tokens": options.tokens}) + "\n" for p in prompts))
    command = [
        sys.executable, "-m", "engine.bench", "serve", f"--base-url={options.url}", f"--model={options.model}",
        "--dataset-name=custom", f"--dataset-path={data}", f"--num-prompts={len(prompts)}", "--ignore-eos",
        f"--max-concurrency={options.concurrency}", "--temperature=0", "--save-result", f"--result-dir={scratch}",
        "--result-filename=ours.json", "--disable-tqdm",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((scratch / "ours.json").read_text())
    return {"requests/s": found["request_throughput"], "TTFT, ms": found["mean_ttft_ms"]}


def theirs(options: argparse.Namespace, prompts: list[str], scratch: Path) -> dict[str, float]:
    data, out = scratch / "theirs.jsonl", scratch / "aiperf"
    data.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
    extra = {"max_tokens": options.tokens, "ignore_eos": True, "temperature": 0}
    settings = {
        "model": options.model, "url": options.url, "endpoint-type": "completions", "input-file": data,
        "custom-dataset-type": "single_turn", "dataset-sampling-strategy": "sequential", "tokenizer": options.tokenizer,
        "request-count": len(prompts), "concurrency": options.concurrency, "extra-inputs": json.dumps(extra),
        "output-artifact-dir": out, "ui": "none",
    }  # fmt: skip
    command = [options.aiperf, "profile", "--streaming"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it has its own packages
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: Any = json.loads(next(out.rglob("profile_export_aiperf.json")).read_text())
    return {"requests/s": found["request_throughput"]["avg"], "TTFT, ms": found["time_to_first_token"]["avg"]}


def compare(options: argparse.Namespace) -> None:
    source = random.Random(0)
    prompts = [f"{source.randint(200, 400)} {source.randint(20, 60)} {i}" for i in range(options.requests)]
    seen: dict[str, list[dict[str, float]]] = {"ours": [], "aiperf": []}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(options.rounds):
            for name, measure in (("ours", ours), ("aiperf", theirs)):
                folder = Path(scratch) / f"{name}-{i}"
                folder.mkdir()
                seen[name].append(measure(options, prompts, folder))
                print(i, name, seen[name][-1], flush=True)
    for metric in ("requests/s", "TTFT, ms"):
        own, other = (statistics.median(run[metric] for run in seen[name]) for name in seen)
        print(f"{metric:12} ours {own:9.2f}  aiperf {other:9.2f}  {own / other - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", required=True, help="its program")
    parser.add_argument("--url", help="of a server; default: one with known delays")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--tokenizer", default="builtin", help="a folder for aiperf; its own comes from the network")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.url:
        compare(options)
        return
    command = [sys.executable, "-m", "tests.engine.bench.fake_openai"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            options.url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            compare(options)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
