"""Run by tests in each of several processes: a script with an `LLM`, as it would run on every host.

python -m tests.engine.hosts.llm_program SETTINGS CASE prints a JSON object of what the calls gave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import Any

from engine import LLM, RequestError, SamplingParams
from tests.engine.buckets import few_buckets

PROMPTS: Any = [[5, 6, 7], [9] * 20, [1, 2, 3, 4], [9] * 20]


def alike(llm: LLM) -> dict[str, Any]:
    """Every call, in every process."""
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    drawn = SamplingParams(n=2, max_tokens=4, logprobs=1, prompt_logprobs=1)  # the seed is drawn, too
    found: dict[str, Any] = {"greedy": [o.outputs[0].token_ids for o in llm.generate(PROMPTS, greedy, use_tqdm=False)]}
    found["drawn"] = [dataclasses.asdict(o) for o in llm.generate(PROMPTS, drawn, use_tqdm=False)]
    found["vectors"] = [o.outputs.embedding for o in llm.embed(PROMPTS, use_tqdm=False)]
    found["errors"] = []
    for call in (
        lambda: llm.generate([[1] * 500], greedy),  # known before the processes meet
        lambda: llm.generate([[1]], greedy, priority=[1]),  # which process 0 alone finds, as it queues it
        lambda: llm.stream([1], greedy),
    ):
        try:
            call()
        except ValueError as error:
            found["errors"].append([type(error).__name__, str(error), getattr(error, "field", None)])
    found["after"] = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, greedy, use_tqdm=False)]
    return found | {"metrics": dataclasses.asdict(llm.get_metrics()), "reset": llm.reset_prefix_cache()}


def apart(llm: LLM, process_id: int) -> None:
    """Another prompt in process 1."""
    llm.generate([[5 + process_id]], SamplingParams(max_tokens=2), use_tqdm=False)


def short(llm: LLM, process_id: int) -> None:
    """Process 1 fails where process 0 does not."""
    if process_id:
        raise RequestError("field", "of process 1 alone")
    llm.generate([[5]], SamplingParams(max_tokens=2), use_tqdm=False)


def main() -> None:
    settings, case = json.loads(sys.argv[1]), sys.argv[2]
    with contextlib.nullcontext() if case == "alike" else few_buckets():
        llm = LLM(
            load_format="dummy", skip_tokenizer_init=True, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=128,
            num_gpu_blocks_override=24, block_size=16, **settings,
        )  # fmt: skip
    if case == "alike":
        print(json.dumps(alike(llm)))
    else:
        {"apart": apart, "short": short}[case](llm, settings["process_id"])


if __name__ == "__main__":
    main()
