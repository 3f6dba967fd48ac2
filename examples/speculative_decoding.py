"""Speculative decoding by prompt lookup: the same answer in fewer steps, where it repeats what stands there already.

    python examples/speculative_decoding.py

Tokens that followed the same words before are drafted, and one step checks them all. What the model would not have said
is thrown away, so that the answer is the same to the token. A text that is written again gains most.
"""

from __future__ import annotations

import time

from engine import LLM, SamplingParams
from engine.weights.default_model import default_model

TEXT = "The old lighthouse keeper counted the ships each evening and wrote their names into a blue book. "
PROMPT = TEXT * 4
SETTINGS = {"max_model_len": 256, "max_num_seqs": 1, "max_num_batched_tokens": 64}


def answer(llm: LLM) -> tuple[list[int], float]:
    """-> the tokens, and the seconds that they took."""
    llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)  # what happens once
    started = time.perf_counter()
    output = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True), use_tqdm=False)[0]
    return list(output.outputs[0].token_ids), time.perf_counter() - started


def main() -> None:
    model = str(default_model())
    plain, plain_seconds = answer(LLM(model=model, **SETTINGS))
    speculation = {"method": "ngram", "num_speculative_tokens": 4}
    llm = LLM(model=model, speculative_config=speculation, **SETTINGS)
    fast, fast_seconds = answer(llm)
    assert fast == plain, "speculation must not change the answer"
    print(
        f"without: {plain_seconds:.2f} s, with: {fast_seconds:.2f} s, {plain_seconds / fast_seconds:.1f} times as fast"
    )
    print(llm.get_tokenizer().decode(fast))


if __name__ == "__main__":
    main()
