"""Make tests/data/humaneval_goldens.json: what transformers in float32 writes after each of HumanEval's prompts.

    OTHER/python scripts/make_humaneval_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf

needs torch, transformers, gguf and accelerate, which are no dependencies of the project. Prompts are plain text, tokens
are greedy, eight prompts at a time (padded on the left), each until a stop string, the end or 160 tokens. A case holds
the tokens and, by position, how far the first token's logit leads wherever that is little: there another right
implementation may choose the second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from humaneval import GOLDENS, MAX_TOKENS, STOP, problems
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8
CLOSE = 1e-2  # gaps below it are written down


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """-> for each prompt its greedy tokens and {position: gap} of the close ones."""
    length = max(map(len, prompts))
    pad = [length - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * n + prompt for n, prompt in zip(pad, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(prompt) for n, prompt in zip(pad, prompts, strict=True)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cases: list[dict[str, Any]] = [{"tokens": [], "close": {}} for _ in prompts]
    running, cache = set(range(len(prompts))), None
    for step in range(MAX_TOKENS):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        best = output.logits[:, -1].topk(2, dim=-1)
        for row in sorted(running):
            case = cases[row]
            case["tokens"].append(best.indices[row, 0].item())
            gap = (best.values[row, 0] - best.values[row, 1]).item()
            if gap < CLOSE:
                case["close"][str(step)] = round(gap, 6)
            text = tokenizer.decode(case["tokens"])
            if case["tokens"][-1] == tokenizer.eos_token_id or any(stop in text for stop in STOP):
                running.discard(row)
        if not running:
            break
        ids = best.indices[:, :1]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    args = parser.parse_args()
    where = {"pretrained_model_name_or_path": str(args.gguf.parent), "gguf_file": args.gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # From a GGUF file transformers takes GPT-2's rules for every model; SmolLM2's own tokenizer.json has these.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()

    texts = [problem["prompt"] for problem in problems()]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    cases: dict[int, dict[str, Any]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        completions = complete(model, tokenizer, [prompts[i] for i in chosen])
        cases |= {i: {"prompt_tokens": len(prompts[i])} | case for i, case in zip(chosen, completions, strict=True)}
        print(f"{len(cases)} of {len(prompts)}", flush=True)

    header = {
        "made_by": "scripts/make_humaneval_goldens.py",
        "versions": {package: metadata.version(package) for package in ("torch", "transformers", "gguf", "tokenizers")},
        "model": {"file": args.gguf.name, "sha256": hashlib.sha256(args.gguf.read_bytes()).hexdigest()},
        "max_tokens": MAX_TOKENS,
        "stop": STOP,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in header.items()]
    body = ",\n".join(json.dumps(cases[i], separators=(",", ":")) for i in range(len(prompts)))
    GOLDENS.write_text("{\n" + ",\n".join(lines) + ',\n"cases": [\n' + body + "\n]\n}\n", encoding="utf-8")
    print(f"{GOLDENS}: {len(cases)} cases, {GOLDENS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
