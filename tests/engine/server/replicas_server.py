"""`python -m tests.engine.server.replicas_server`: the real server over two replicas of a tiny model, each on a device.

Steps take STEP_SECONDS, for a test to see them. A device fails as soon as it has a step of the prompt that is BROKEN.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.replicas import Replicas
from engine.runner import Launched
from engine.server import ServerOptions, run
from engine.startup import start

MODEL = Path(__file__).parents[2] / "data" / "tiny" / "llama3"
BROKEN = [6, 6, 6]
STEP_SECONDS = 0.01


def load() -> Replicas:
    engine = start(EngineConfig(
        model=str(MODEL), skip_tokenizer_init=True, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=256,
        block_size=16, num_gpu_blocks_override=24, data_parallel_size=2,
    ))  # fmt: skip
    assert isinstance(engine, Replicas)
    for core in engine.cores:
        slow_down(core)
    return engine


def slow_down(core: EngineCore) -> None:
    collect = core.runner.collect

    def collect_or_fail(launched: Launched) -> list[list[int]]:
        time.sleep(STEP_SECONDS)
        if any(row.request.group.prompt_token_ids == BROKEN for row in launched.plan.rows):
            raise jax.errors.JaxRuntimeError("INTERNAL: the device has gone")
        return collect(launched)

    core.runner.collect = collect_or_fail


if __name__ == "__main__":
    sys.exit(run(load, ServerOptions(served_model_name=("tiny",), host="127.0.0.1", port=0)))
