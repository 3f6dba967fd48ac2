"""HumanEval with the default model: are greedy completions those of transformers in float32, and how many are right?

    python scripts/eval_humaneval.py [--run-code]

Prompts are plain text; all 164 are generated together. Each completion is held against
tests/data/humaneval_goldens.json (scripts/make_humaneval_goldens.py makes it): it must be the same token for token,
or part from it where transformers' own choice was closer than 1e-3 between two logits. With --run-code the
completions are also run against the problems' tests, for pass@1 (Chen et al. 2021). That executes code which a model
wrote: in processes of their own with limits on time, memory, files and processes, but on this machine and as this
user.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from humaneval import GOLDENS, MAX_TOKENS, STOP, problems

SMALL_GAP = 1e-3  # where the reference's first two logits are closer, either token is right
MAX_MODEL_LEN = 1024
RUN_SECONDS = 3
# Sets its own limits, then runs the program that it is given. Not between fork and exec: JAX has threads by then.
LIMITED = f"""
import resource, sys
program = sys.stdin.read()
for kind, most in (
    (resource.RLIMIT_CPU, {RUN_SECONDS}), (resource.RLIMIT_AS, 1 << 30), (resource.RLIMIT_FSIZE, 1 << 20),
    (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 16), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(kind, (most, most))
exec(compile(program, "program", "exec"), {{"__name__": "program"}})
"""


def complete(texts: list[str]) -> list[Any]:
    """-> the engine's greedy completion of each text."""
    from engine import LLM, SamplingParams
    from engine.weights.default_model import default_model

    llm = LLM(model=str(default_model()), dtype="float32", max_model_len=MAX_MODEL_LEN)
    encode = llm.get_tokenizer().encode
    prompts = [{"prompt_token_ids": encode(text, add_special_tokens=False)} for text in texts]
    started = time.perf_counter()
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS, stop=list(STOP)))
    seconds = time.perf_counter() - started
    count = sum(len(answer.outputs[0].token_ids) for answer in answers)
    print(f"{count} tokens of {len(texts)} completions in {seconds:.1f} s, {count / seconds:.0f} tokens/s")
    return [answer.outputs[0] for answer in answers]


def compare(token_ids: list[int], case: dict[str, Any]) -> str:
    """-> "same", "near tie" or "different": how the tokens compare with the reference's."""
    for i, (ours, reference) in enumerate(zip(token_ids, case["tokens"], strict=False)):
        if ours != reference:
            return "near tie" if case["close"].get(str(i), 1.0) < SMALL_GAP else "different"
    return "same" if len(token_ids) == len(case["tokens"]) else "different"


def passes(problem: dict[str, str], completion: str) -> bool:
    """-> whether prompt and completion pass the problem's tests, run in a process of its own."""
    program = f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", LIMITED], input=program.encode(), cwd=scratch, env={},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=3 * RUN_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-code", action="store_true", help="execute the completions, for pass@1")
    options = parser.parse_args()

    tasks, cases = problems(), json.loads(GOLDENS.read_text("utf-8"))["cases"]
    outputs = complete([task["prompt"] for task in tasks])
    verdicts = [compare(list(output.token_ids), case) for output, case in zip(outputs, cases, strict=True)]
    counts = {verdict: verdicts.count(verdict) for verdict in ("same", "near tie", "different")}
    print(f"held against transformers in float32: {counts}")
    for task, output, case, verdict in zip(tasks, outputs, cases, verdicts, strict=True):
        if verdict != "same":
            tokens = list(output.token_ids)
            at = next((i for i, (a, b) in enumerate(zip(tokens, case["tokens"], strict=False)) if a != b), len(tokens))
            print(f"  {task['task_id']}: {verdict} from token {at} of {len(case['tokens'])}")
    if options.run_code:
        passed = [task["task_id"] for task, output in zip(tasks, outputs, strict=True) if passes(task, output.text)]
        print(f"pass@1 of greedy: {len(passed)} of {len(tasks)} = {len(passed) / len(tasks):.1%}: {', '.join(passed)}")
    if counts["different"]:
        sys.exit("error: completions differ where the reference's choice was clear")


if __name__ == "__main__":
    main()
