"""`python -m engine.generate "a question"`: stream a chat answer to the terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from absl import app, flags

from engine.config import json_setting
from engine.request import SamplingParams

FLAGS = flags.FLAGS
PURPOSE = "a chat answer, streamed to the terminal"


def define(values: flags.FlagValues) -> None:
    """Define the program's flags."""
    at: Any = {"flag_values": values}
    flags.DEFINE_string("model", None, "A GGUF file or a Hugging Face folder; default: SmolLM2-135M-Instruct.", **at)
    flags.DEFINE_string("system", None, "A system message.", **at)
    flags.DEFINE_integer("max_tokens", 512, "Longest answer, in tokens.", lower_bound=1, **at)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0, **at)
    flags.DEFINE_integer("seed", None, "Makes a sampled answer repeatable.", **at)
    flags.DEFINE_string("speculative_config", None, "JSON; as of python -m engine.serve.", **at)
    flags.DEFINE_integer("max_model_len", 2048, "Longest conversation, in tokens.", lower_bound=1, **at)


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    question = " ".join(arguments[1:])
    if not question:
        raise app.UsageError("what is the question?")
    from engine.llm import LLM  # after the flags are checked: it takes a second
    from engine.weights.default_model import default_model

    model = FLAGS.model or str(default_model())
    messages = [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []
    messages.append({"role": "user", "content": question})
    sizes: dict[str, Any] = dict(max_model_len=FLAGS.max_model_len, max_num_seqs=1, max_num_batched_tokens=256)
    try:
        drafts = json_setting("speculative_config", FLAGS.speculative_config)
        llm = LLM(model=model, speculative_config=drafts, **sizes)
        params = SamplingParams(temperature=FLAGS.temperature, max_tokens=FLAGS.max_tokens, seed=FLAGS.seed)
        answer = llm.stream(llm.chat_prompt(messages), params)
    except ValueError as error:
        sys.exit(f"error: {error}")
    first, count = None, 0
    for update in answer:
        first = first or time.perf_counter()
        count += len(update.token_ids)
        print(update.text, end="", flush=True)
    assert first is not None
    rate = (count - 1) / max(time.perf_counter() - first, 1e-9)
    print(f"\n\n{count} tokens, first after {first - started:.1f} s, then {rate:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    define(FLAGS)
    app.run(main)
