"""Whether an attention backend gives the tokens that the plain one gives: greedy answers, one model, both backends.

    python scripts/check_tokens.py --model FOLDER | --shape qwen3-0.6b [--backend triton]

Prompts are random, of 5 to 3000 tokens, with a prefix that half share; prefills come in chunks. Two answers may
part where two tokens are nearly as likely: no further apart than TIE times the largest difference, over all tokens
before, between what the backends give as one token's log-probability. Anything else is wrong, and exit code 1.
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

from model_options import add_model_options, model_settings

from engine import LLM, RequestOutput, SamplingParams
from engine.config import make_config
from engine.memory import limit_gpu_pool

TIE = 2.0  # both log-probabilities may be off, each in its direction
LENGTHS = (5, 17, 64, 130, 500, 1111, 2047, 3000)
SETTINGS: dict[str, Any] = dict(
    max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=1024, kv_cache_memory_bytes=4 << 30,
    skip_tokenizer_init=True,
)  # fmt: skip


def answers(model: dict[str, Any], backend: str, prompts: list[Any]) -> list[RequestOutput]:
    llm = LLM(**model, attention_backend=backend, **SETTINGS)
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    limit_gpu_pool(make_config(model="any"))
    source = random.Random(0)
    draw = lambda count: [source.randrange(1000, 30000) for _ in range(count)]
    shared = draw(700)
    prompts = [{"prompt_token_ids": (shared if i % 2 else []) + draw(length)} for i, length in enumerate(LENGTHS)]
    with model_settings(options) as model:
        plain, other = (answers(model, name, prompts) for name in ("xla", options.backend))
    partings, noise = [], 0.0
    for ours, theirs in zip(other, plain, strict=True):
        tokens, wanted = ours.outputs[0].token_ids, theirs.outputs[0].token_ids
        mine, right = ours.outputs[0].logprobs or [], theirs.outputs[0].logprobs or []
        at = next((i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]), len(wanted))
        noise = max([noise, *(abs(mine[i][wanted[i]].logprob - right[i][wanted[i]].logprob) for i in range(at))])
        gap = 0.0
        if at < len(wanted):
            gap = right[at][wanted[at]].logprob - (right[at][tokens[at]].logprob if tokens[at] in right[at] else -99.0)
        partings.append((at, gap))
    for (at, gap), length in zip(partings, LENGTHS, strict=True):
        print(f"prompt of {length:5}: {at} tokens equal" + (f", then a gap of {gap:.4f}" if gap else ""))
    bad = sum(gap > TIE * noise for _, gap in partings)
    print(f"log-probabilities differ by {noise:.4f} at most; {bad} of {len(LENGTHS)} answers part where that is no tie")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
