"""Host time of one step with many running requests and a model that costs nothing: plan, build, commit, detokenize.

    python scripts/bench_host.py [--rows 256] [--steps 200]

Prints the median and the 99th percentile in milliseconds, and the share of each part.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import numpy as np

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.models.config import LayerSpec, ModelConfig
from engine.request import SamplingParams
from engine.runner import Launched
from engine.step_input import BatchBuilder, choose_shape, step_shapes
from engine.tokenizer_files import load_tokenizer
from engine.weights.default_model import default_model

MAX_MODEL_LEN, PAGE = 4096, 16


class NoModel:
    """A runner whose device answers at once: it builds each step's input and returns made-up tokens."""

    def __init__(self, rows: int, vocab_size: int):
        self.num_pages = rows * MAX_MODEL_LEN // PAGE + 1
        self.shapes = step_shapes(rows, 8192)
        self.builder = BatchBuilder(rows, MAX_MODEL_LEN // PAGE)
        self.random = np.random.default_rng(0)
        self.vocab_size, self.drafter = vocab_size, None

    def launch(self, plan) -> Launched:
        shape = choose_shape(self.shapes, plan, self.builder.admit(plan))
        list(self.builder.table_rows(plan))
        self.builder.build(plan, shape)
        return Launched(plan, SimpleNamespace(runs=None))  # type: ignore[arg-type]

    def collect(self, launched: Launched) -> list[list[int]]:
        return self.random.integers(1000, self.vocab_size, (len(launched.plan.rows), 1)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    tokenizer = load_tokenizer(default_model())
    model = ModelConfig("llama", tokenizer.vocab_size, 8, 8, 1, 1, 8, MAX_MODEL_LEN, (LayerSpec(None),))
    config = EngineConfig(model="none", max_num_seqs=options.rows, max_num_batched_tokens=8192, block_size=PAGE)
    resolved = config.resolve(model_max_len=MAX_MODEL_LEN, platform="cpu")
    core = EngineCore(config, resolved, model, tokenizer, NoModel(options.rows, tokenizer.vocab_size))  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=options.steps + 50, ignore_eos=True, stop=["\n\nQ:"])
    for i in range(options.rows):
        core.add(core.prepare(str(i), list(range(1000 + i, 1128 + i)), params))
    while len(core.scheduler.running) < options.rows:
        core.step()
    for _ in range(10):
        core.step()
    times = []
    for _ in range(options.steps):
        started = time.perf_counter()
        updates = core.step()
        times.append((time.perf_counter() - started) * 1e3)
        assert len(updates) == options.rows
    median, worst = np.percentile(times, [50, 99])
    print(f"{options.rows} rows: {median:.2f} ms a step (p50), {worst:.2f} ms (p99)")


if __name__ == "__main__":
    main()
