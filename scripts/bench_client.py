"""The load generator itself: how true its figures are, and what it costs, against a server with known delays.

    python scripts/bench_client.py [--rate 200] [--requests 1000] [--tokens 20]

The server is a process of its own that sends each token when the prompt says, counted from the request's arrival. What
that makes of each metric is computed here, apart from the benchmark's own code; that timers have milliseconds is in
what is reported. 200 requests a second of 20 tokens are 4,000 events a second.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the server is one of the tests'
from tests.engine.bench.fake_openai import delays  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=20)
    options = parser.parse_args()
    source = random.Random(0)
    prompts = [[source.randint(100, 300), source.randint(20, 60), i] for i in range(options.requests)]
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "prompts.jsonl", Path(scratch) / "out.json"
        data.write_text("".join(json.dumps({"prompt": p, "output_tokens": options.tokens}) + "\n" for p in prompts))
        command = [sys.executable, "-m", "tests.engine.bench.fake_openai"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                port = server.stdout.readline().strip()
                bench = [
                    sys.executable, "-m", "engine.bench", "serve", f"--port={port}", f"--request-rate={options.rate}",
                    "--dataset-name=custom", f"--dataset-path={data}", f"--num-prompts={options.requests}",
                    "--metric-percentiles=50,90,99", "--save-result", f"--result-dir={scratch}",
                    "--result-filename=out.json",
                ]  # fmt: skip
                subprocess.run(bench, cwd=ROOT, check=True)
            finally:
                server.kill()
        report = json.loads(out.read_text())
    waits = 1000 * np.array([delays(prompt, options.tokens) for prompt in prompts])
    known = {"ttft": waits[:, 0], "tpot": waits[:, 1:].mean(1), "itl": waits[:, 1:].ravel(), "e2el": waits.sum(1)}
    worst = 0.0
    print(f"\n{'metric':18}{'truth, ms':>12}{'reported':>12}{'off by':>10}")
    for name, values in known.items():
        truths = {"mean": values.mean(), "median": np.median(values)} | {
            f"p{p}": np.percentile(values, p) for p in (50, 90, 99)
        }
        for kind, truth in truths.items():
            off = report[f"{kind}_{name}_ms"] / truth - 1
            worst = max(worst, abs(off))
            print(f"{kind + ' ' + name:18}{truth:12.2f}{report[f'{kind}_{name}_ms']:12.2f}{off:10.2%}")
    events = options.requests * options.tokens / report["duration"]
    share = report["client_cpu_share"]
    print(f"worst: {worst:.2%}; {events:.0f} events/s at {share:.0%} of a core, {share / events * 1e6:.0f} us each")


if __name__ == "__main__":
    main()
