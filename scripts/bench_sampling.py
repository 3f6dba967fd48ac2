"""What sampling parameters cost: tokens a second of decodes by what their requests ask for.

    python scripts/bench_sampling.py --shape qwen3-0.6b | --model FOLDER [--rows 8,64,256] [--out sampling.json]

On an accelerator it first draws from random logits there and on the CPU, where thresholds are found another way, and
counts the rows whose tokens differ: two scores as good as equal may.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from model_options import add_model_options, model_settings
from tqdm import tqdm

from engine import LLM, SamplingParams
from engine.config import make_config
from engine.memory import limit_gpu_pool
from engine.sampler import ACTIVE, SamplingInput, sample
from engine.slots import empty_tables

OUTPUT = 256  # tokens of each answer
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k": {"temperature": 0.8, "top_k": 20},
    "top_k, top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "logprobs": {"temperature": 0, "logprobs": 1},
    "presence_penalty": {"temperature": 0.7, "presence_penalty": 0.5},
}


def differing_rows(rows: int = 256, vocab_size: int = 151936) -> int:
    """-> of so many random rows, those whose token is not the CPU's: flat and peaked logits, all limits."""
    source = np.random.default_rng(0)
    logits = source.standard_normal((rows, vocab_size)) * source.uniform(1, 6, (rows, 1))
    ints, floats = (lambda x: np.asarray(x, np.int32)), (lambda x: np.asarray(x, np.float32))
    off = np.zeros(rows)
    given = logits.astype(np.float32), SamplingInput(
        floats(source.uniform(0.3, 1.5, rows)), ints(source.choice([0, 1, 20, 1000], rows)),
        floats(source.choice([1, 0.95, 0.5], rows)), floats(source.choice([0, 0.05], rows)),
        floats(off + 1), floats(off), floats(off), source.integers(0, 2**32, (rows, 2), dtype=np.uint32),
        ints(np.arange(rows)), ints(off), ints(off), ints(off + ACTIVE),
    ), empty_tables(1, 8, vocab_size)  # type: ignore[arg-type]  # fmt: skip
    draw = jax.jit(lambda *given: sample(*given, plain=True).token)
    ours = draw(*jax.device_put(given, jax.devices()[0]))
    return int((np.asarray(ours) != np.asarray(draw(*jax.device_put(given, jax.devices("cpu")[0])))).sum())


def tokens_per_second(llm: LLM, count: int, wish: dict[str, Any], source: random.Random) -> float:
    prompts = [{"prompt_token_ids": [source.randrange(1000, 30000) for _ in range(64)]} for _ in range(count)]
    started = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(**wish, max_tokens=OUTPUT, ignore_eos=True), use_tqdm=False)
    elapsed = time.perf_counter() - started
    assert all(len(output.outputs[0].token_ids) == OUTPUT for output in outputs)
    return count * OUTPUT / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--rows", default="8,64,256")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--settings", default="{}", help="JSON: more of EngineConfig's settings")
    options = parser.parse_args()
    rows = [int(n) for n in options.rows.split(",")]
    settings = dict(max_model_len=1024, max_num_seqs=max(rows), skip_tokenizer_init=True) | json.loads(options.settings)
    limit_gpu_pool(make_config(model=options.model or options.shape, **settings))
    report: dict[str, Any] = {}
    if jax.devices()[0].platform != "cpu":
        report["differing_rows"] = differing_rows()
        print(f"{report['differing_rows']} of 256 rows got another token than on the CPU", flush=True)
    with model_settings(options) as model:
        llm = LLM(**model, **settings)
    source = random.Random(0)
    for name, wish in tqdm(WISHES.items(), disable=None):
        best = [max(tokens_per_second(llm, n, wish, source) for _ in range(options.repeat)) for n in rows]
        report[name] = dict(zip(map(str, rows), best, strict=True))
        print(f"{name:18}" + "".join(f"{n:5} rows {rate:8.0f} tokens/s" for n, rate in zip(rows, best, strict=True)))
        if options.out:
            options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
