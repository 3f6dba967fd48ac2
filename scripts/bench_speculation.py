"""What speculation gains where texts are copied, and costs where there is nothing to gain: SmolLM2-135M on the CPU.

    python scripts/bench_speculation.py [--model FILE.gguf] [--config '{"method": "ngram", ...}'] [--output FILE]

"copying": one request at a time, greedy, of prompts that ask to edit code or to quote from a text; "random": 32 at
once, sampled, of random tokens. Both engines stand side by side and take turns, run by run, so that whatever else the
machine does meets both; a figure is the fastest of `--repeats` runs. Tokens of both must be the same.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from engine.weights.default_model import default_model

CODE = '''import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def load_settings(path: Path) -> dict:
    """Read the settings from a file and fill in what is missing."""
    with path.open() as file:
        settings = json.load(file)
    settings.setdefault("host", "localhost")
    settings.setdefault("port", 8000)
    settings.setdefault("timeout", 30)
    logger.info("settings read from %s", path)
    return settings


def save_settings(settings: dict, path: Path) -> None:
    """Write the settings to a file, sorted by name."""
    with path.open("w") as file:
        json.dump(settings, file, indent=2, sort_keys=True)
    logger.info("settings written to %s", path)
'''
TEXT = """The lighthouse at Cape Orford was built in 1871 from granite that ships had carried as ballast. Its lamp first
burned whale oil, then kerosene, and from 1925 electric light. Three keepers lived there with their families; the last
of them, Martha Ellery, left in 1962, when the lamp was made to light itself. In 1980 the tower was struck by lightning
twice within a month, and the lens, made in Paris by Barbier and Company, cracked. It was replaced by a small beacon.
Today a trust keeps the house open from May to September, and visitors climb 114 steps to the gallery."""
QUESTIONS = {  # asked in the model's chat template
    "rename": f"Rename the variable `settings` to `options` and write the whole file again.\n\n```python\n{CODE}```",
    "repeat": f"Repeat this text word for word:\n\n{TEXT}",
    "quote": f"{TEXT}\n\nQuote the sentences of this text that are about the lamp and its lens, and about keepers.",
}
TEXTS = {  # to be continued
    "edit": f"File:\n```python\n{CODE}```\n\nWith a comment on top:\n```python\n# settings on disk\nimport json\n",
    "answer": f'{TEXT}\n\nQ: Tell me about the lighthouse.\nA: "The lighthouse at Cape Orford was built in 1871',
    "copy": f"Text: The cat sat.\nCopy: The cat sat.\n\nText: {TEXT}\nCopy:",
}
MAX_TOKENS = 192
ROWS = 32


def copying(llm: LLM) -> tuple[float, list[list[int]]]:
    """-> seconds, and the tokens of each prompt."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    chats = [llm.chat_prompt([{"role": "user", "content": text}]) for text in QUESTIONS.values()]
    started = time.perf_counter()
    outputs = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in (*chats, *TEXTS.values())]
    return time.perf_counter() - started, [output.outputs[0].token_ids for output in outputs]


def random_text(llm: LLM) -> tuple[float, list[list[int]]]:
    """-> seconds, and the tokens of each prompt."""
    draw = random.Random(0)
    prompts = [[draw.randrange(1_000, 30_000) for _ in range(32)] for _ in range(ROWS)]
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=128, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started, [output.outputs[0].token_ids for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the GGUF file of SmolLM2-135M-Instruct, if not to be fetched")
    parser.add_argument("--config", default='{"method": "ngram", "num_speculative_tokens": 10}')
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where figures go, as JSON")
    options = parser.parse_args()
    model = str(options.model or default_model())
    settings: dict[str, Any] = dict(max_model_len=1024, max_num_seqs=ROWS)
    engines = {
        "without": LLM(model, **settings),
        "with": LLM(model, speculative_config=json.loads(options.config), **settings),
    }
    report: dict[str, Any] = {"config": json.loads(options.config)}
    for name, work in (("copying", copying), ("random", random_text)):
        seconds: dict[str, list[float]] = {which: [] for which in engines}
        tokens = {}
        for _ in range(options.repeats):
            for which, llm in engines.items():
                llm.reset_prefix_cache()
                elapsed, tokens[which] = work(llm)
                seconds[which].append(elapsed)
        if tokens["with"] != tokens["without"]:
            raise SystemExit(f"{name}: tokens differ")
        count = sum(map(len, tokens["with"]))
        rates = {which: count / min(times) for which, times in seconds.items()}
        stats = engines["with"].get_metrics().speculation
        assert stats is not None
        report[name] = dict(
            tokens_per_s=rates, ratio=rates["with"] / rates["without"], seconds=seconds, drafts=vars(stats)
        )
        shown = f"{rates['without']:7.1f} tokens/s without, {rates['with']:7.1f} with: {report[name]['ratio']:.2f} x"
        print(f"{name:8} {shown}; {stats.num_accepted_tokens} of {stats.num_draft_tokens} drafts right", flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
