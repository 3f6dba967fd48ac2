"""lm-eval's tasks with this engine: in process, or through a server as lm-eval's own local-completions asks it.

    python scripts/eval_lm.py --model MODEL --tasks everyday --include-path examples/lm_eval [--out results.json]
    python scripts/eval_lm.py --base-url http://127.0.0.1:8000 --tasks …

needs the extra `eval`: pip install quire[eval]. Tasks are lm-eval's own, or those of YAML files below --include-path,
whose data files are named relative to that folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from engine import LLM, SamplingParams


class QuireLM(TemplateLM):
    """The engine as lm-eval sees a model."""

    def __init__(self, llm: LLM):
        super().__init__()
        self.llm = llm
        self.own_tokenizer = llm.get_tokenizer()

    @property
    def max_length(self) -> int:
        return self.llm.core.resolved.max_model_len

    @property
    def eot_token_id(self) -> int:
        return self.own_tokenizer.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.own_tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.llm.core.config.model

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.own_tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.own_tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """-> for each (_, context, continuation) the continuation's log-probability, and whether it is the greedy one.

        A pair that is too long loses the beginning of its context, as in lm-eval's hf model.
        """
        pairs = [((context + end)[-(self.max_length - 1) :], len(end)) for _, context, end in requests]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts: list[Any] = [{"prompt_token_ids": tokens} for tokens, _ in pairs]
        answers = []
        for output, (tokens, count) in zip(self._generate(prompts, params, disable_tqdm), pairs, strict=True):
            assert output.prompt_logprobs is not None
            scored = zip(output.prompt_logprobs[-count:], tokens[-count:], strict=True)
            entries = [entry[token] for entry, token in scored if entry is not None]
            answers.append((sum(e.logprob for e in entries), all(e.rank == 1 for e in entries)))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """-> the log-probability of each text, in windows as long as the model takes."""
        texts, windows = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1):
                texts.append(i)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(texts, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """-> the answer to each prompt, up to one of its stop strings."""
        prompts: list[Any] = []
        params = []
        for request in requests:
            text, asked = request.args
            until = asked.get("until") or []
            most = asked.get("max_gen_toks", 256)
            ids = self.tok_encode(text)[-(self.max_length - most) :]
            prompts.append({"prompt_token_ids": ids})
            params.append(
                SamplingParams(
                    temperature=asked.get("temperature", 0.0) if asked.get("do_sample", True) else 0.0,
                    top_p=asked.get("top_p", 1.0),
                    max_tokens=most,
                    stop=[until] if isinstance(until, str) else list(until),
                    seed=0,
                )
            )
        return [output.outputs[0].text for output in self._generate(prompts, params, disable_tqdm)]

    def _generate(self, prompts: list[Any], params: Any, quiet: bool) -> list[Any]:
        return self.llm.generate(prompts, params, use_tqdm=not quiet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="run the engine in process")
    which.add_argument("--base-url", help="ask a server, http://HOST:PORT")
    parser.add_argument("--tasks", required=True, help="with commas between")
    parser.add_argument("--include-path", type=Path, help="folder of task files")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=float, help="so many examples of each task")
    parser.add_argument("--settings", default="{}", help="JSON: EngineConfig's settings, for --model")
    parser.add_argument("--served-model-name", default=None, help="for --base-url; default: the first that it lists")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    if options.model:
        model: Any = QuireLM(LLM(options.model, **json.loads(options.settings)))
        arguments = None
    else:
        url = options.base_url.rstrip("/")
        name = options.served_model_name or first_model(url)
        model, arguments = "local-completions", dict(model=name, base_url=f"{url}/v1/completions", num_concurrent=8)
    manager = TaskManager(include_path=str(options.include_path.resolve()) if options.include_path else None)
    with contextlib.chdir(options.include_path or "."):
        found = simple_evaluate(
            model, arguments, tasks=options.tasks.split(","), num_fewshot=options.num_fewshot, limit=options.limit,
            task_manager=manager, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    if found is None:
        sys.exit("error: lm-eval returned nothing")
    print(make_table(found))
    if options.out:
        options.out.write_text(json.dumps(found["results"], indent=1))


def first_model(url: str) -> str:
    """-> the first model that a server lists."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]


if __name__ == "__main__":
    main()
