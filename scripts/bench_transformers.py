"""transformers' share of scripts/bench_cpu.py: the same workloads through float32 `generate`, printed as JSON.

Run by any Python that has torch, transformers and gguf (accelerate too, for GGUF files); it needs nothing of Quire:

    PYTHON scripts/bench_transformers.py MODEL.gguf < workloads.json

Workloads are {name: {"prompts": [[token id, ...], ...], "output_len": n, "batched": bool, "repeats": n}}. The prompts
of one have one length, so that a batch needs no padding; not batched, they run one after another. Printed are the
versions and for each workload the seconds of the fastest run and its token ids. A run that takes more than `LONG`
seconds is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

LONG = 60.0


@torch.inference_mode()
def generate(model: Any, prompts: list[list[int]], output_len: int) -> list[list[int]]:
    """-> `output_len` greedy tokens for each prompt, as one batch; eos does not end it."""
    tokens = torch.tensor(prompts)
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        min_new_tokens=output_len,
        max_new_tokens=output_len,
        do_sample=False,
        eos_token_id=None,
    )
    return output[:, tokens.shape[1] :].tolist()


def measure(model: Any, workload: dict[str, Any]) -> dict[str, Any]:
    """-> seconds of the fastest run and its tokens."""
    prompts = workload["prompts"]
    batches = [prompts] if workload["batched"] else [[prompt] for prompt in prompts]
    seconds, token_ids = float("inf"), []
    for _ in range(workload["repeats"]):
        started = time.perf_counter()
        tokens = [row for batch in batches for row in generate(model, batch, workload["output_len"])]
        elapsed = time.perf_counter() - started
        if elapsed < seconds:
            seconds, token_ids = elapsed, tokens
        if elapsed > LONG:
            break
    return {"seconds": seconds, "token_ids": token_ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    workloads = json.load(sys.stdin)

    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(args.gguf.parent), gguf_file=args.gguf.name, dtype=torch.float32
    ).eval()
    generate(model, [[1, 2, 3]], 4)  # what happens once happens here
    results = {}
    for name, workload in workloads.items():
        results[name] = measure(model, workload)
        print(f"transformers {name}: {results[name]['seconds']:.2f} s", file=sys.stderr, flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    json.dump({"versions": versions, "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
