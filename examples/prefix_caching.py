"""The same long text twice, with two questions: the second one's first token comes at once.

    python examples/prefix_caching.py

The first question has all of the text to compute, the second only itself: the pages of the KV cache that hold the text
are shared. Nothing has to be asked for; `cache_salt` keeps users apart who must not learn of each other by timing.
"""

from __future__ import annotations

import time
from typing import Any

from engine import LLM, SamplingParams
from engine.weights.default_model import default_model

LENGTH = 1500  # tokens of the text
RULES = "Rule {}: whoever borrows a book brings it back within {} days, or pays for each day that it is late. "
QUESTIONS = ("\nQuestion: What does a late book cost?\nAnswer:", "\nQuestion: Who may borrow a book?\nAnswer:")


def first_token_seconds(llm: LLM, ids: list[int]) -> tuple[float, str]:
    """-> how long the first token took, and the answer."""
    started, first, text = time.perf_counter(), None, ""
    prompt: Any = {"prompt_token_ids": ids}
    for update in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=16)):
        first = first or time.perf_counter() - started
        text += update.text
    assert first is not None
    return first, text


def main() -> float:
    """-> the second time as a share of the first."""
    # Pages are shared once they are full: smaller ones share more of a text's end.
    llm = LLM(model=str(default_model()), max_model_len=2048, max_num_seqs=1, max_num_batched_tokens=512, block_size=16)
    encode = llm.get_tokenizer().encode
    first_token_seconds(llm, encode(QUESTIONS[0]))  # what happens once in a process is nobody's time to first token
    text = encode("".join(RULES.format(i, i + 7) for i in range(100)))[:LENGTH]
    times = []
    for question in QUESTIONS:
        seconds, answer = first_token_seconds(llm, text + encode(question, add_special_tokens=False))
        times.append(seconds)
        print(f"first token after {seconds:.3f} s:{answer}")
    print(f"{len(text)} tokens in common: the second took {times[1] / times[0]:.2f} of the first")
    return times[1] / times[0]


if __name__ == "__main__":
    main()
