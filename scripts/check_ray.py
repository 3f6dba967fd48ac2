"""A Ray Data job over two local workers, one of which is killed midway: is every prompt answered once, and alike?

python scripts/check_ray.py [--prompts 2000] [--workers 2]       (needs the [ray] extra)
"""

from __future__ import annotations

import argparse
import os
import random
import signal
from collections import Counter
from pathlib import Path

import psutil
import ray
import ray.data

from engine.ray_data import answer

MODEL = Path(__file__).parents[1] / "tests/data/tiny/llama3"
SETTINGS = dict(
    model=str(MODEL), skip_tokenizer_init=True, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=128,
    block_size=16, num_gpu_blocks_override=160,
)  # fmt: skip


def kill_one() -> int:
    """-> the process id of a worker that is no more."""
    found = [p for p in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(p.info["cmdline"] or [])]
    victim = found[0].pid
    os.kill(victim, signal.SIGKILL)
    return victim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    draw = random.Random(3)
    prompts = [[draw.randrange(160) for _ in range(draw.randrange(2, 30))] for _ in range(options.prompts // 2)] * 2
    rows = [{"index": i, "prompt_token_ids": prompt} for i, prompt in enumerate(prompts)]
    ray.init(num_cpus=options.workers + 1, include_dashboard=False, log_to_driver=False)
    answered = answer(
        ray.data.from_items(rows, override_num_blocks=40), SETTINGS,
        {"temperature": 0, "max_tokens": 8, "ignore_eos": True}, workers=options.workers, batch_size=50,
    )  # fmt: skip
    seen: Counter[int] = Counter()
    tokens: dict[int, list[int]] = {}
    killed = None
    for row in answered.iter_rows():
        seen[row["index"]] += 1
        tokens[row["index"]] = list(row["token_ids"])
        if killed is None and len(seen) > options.prompts // 4:
            killed = kill_one()
    half = len(prompts) // 2
    alike = sum(tokens.get(i) == tokens.get(i + half) for i in range(half))
    once = sum(count == 1 for count in seen.values())
    print(f"worker {killed} was killed; {once} of {len(prompts)} prompts were answered once")
    print(f"{alike} of {half} pairs of the same prompt are alike")


if __name__ == "__main__":
    main()
