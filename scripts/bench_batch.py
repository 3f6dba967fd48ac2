"""A batch of many short lines with a fake model, killed three times: how fast, how much memory, is any line lost?

    python scripts/bench_batch.py [--lines 100000]

The model costs nothing, so that what is measured is reading, tokenizing, scheduling, formatting and writing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    options = parser.parse_args()
    body = {"prompt": "a short line", "max_tokens": 2}
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "in.jsonl", Path(scratch) / "out.jsonl"
        with source.open("w") as file:
            for i in range(options.lines):
                request = {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(request) + "\n")
        command = [sys.executable, "-m", "tests.engine.batch.fake_batch", str(source), str(target)]
        started = time.perf_counter()
        for share in (0.2, 0.5, 0.8):
            with subprocess.Popen(command, cwd=ROOT) as child:
                while count(target) < share * options.lines and child.poll() is None:
                    time.sleep(0.05)
                child.kill()
            print(f"killed with {count(target)} lines done", flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
        seconds = time.perf_counter() - started
        ids = [json.loads(row)["custom_id"] for row in target.read_text().splitlines()]
    wanted = {f"request-{i}" for i in range(options.lines)}
    print(f"{len(ids)} rows, {len(wanted - set(ids))} lines lost, {len(ids) - len(set(ids))} answered twice")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000  # the largest of the four
    print(f"{options.lines / seconds:.0f} lines/s with the restarts, {memory:.0f} MB resident at most")
    sys.exit(set(ids) != wanted or len(ids) != len(wanted))


if __name__ == "__main__":
    main()
