"""Make tests/data/smollm2_goldens.json: what transformers in float32 answers on the weights of a GGUF file.

The engine's numerics are held against this file. It is made once and committed, so torch is no dependency of the
project. To make it again, use an environment of its own:

    python -m venv goldens && goldens/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
    goldens/bin/python scripts/make_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf

torch may be a CPU build; it takes a few minutes on two cores. transformers dequantises the file itself. Nothing is
written unless the model answers a question whose answer is known, and unless one pass over a whole sequence agrees with
the steps that made it.

Each case of the file has `prompt_token_ids`; `token_ids`, the greedy continuation (eos does not end it); for each
continued position `logprobs` of the token and `gaps`, the top logit less the second; `prompt_logprobs` of prompt tokens
1 onwards given what is before; and `top`, the five most likely [id, logprob] at a few prompt positions, where the first
six are told apart by more than `TOP_MARGIN`. Log-probabilities are natural. `text` is for the reader only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

OUTPUT = Path(__file__).parent.parent / "tests" / "data" / "smollm2_goldens.json"
NUM_TOKENS = 64
SMALL_GAP = 1e-3  # below it two right implementations may choose differently
NOISE = 1e-4  # most that two float32 computations of one logprob may differ by; 2.4e-5 was seen
TOP_MARGIN = 0.02
TOP_POSITIONS = 4
CHECK_QUESTION, CHECK_ANSWER = "What is the capital of France?", "The capital of France is Paris.<|im_end|>"

QUESTIONS = {
    "capital": CHECK_QUESTION,
    "sky": "Why is the sky blue?",
    "arithmetic": "I have 17 apples, eat 3 and buy 12 more. How many apples do I have now?",
    "poem": "Write a short poem about a lighthouse in winter.",
    "list": "Name five animals that lay eggs. Answer with a numbered list.",
    "translate": "Translate to French: 'The train leaves at half past seven.'",
    "code_question": "Write a Python function that returns the n-th Fibonacci number.",
    "japanese": "「猫」は英語で何と言いますか？",
    "greek": "Τι είναι η δημοκρατία;",
    "accents": "Où se trouve la forêt de Brocéliande ? Réponds en français.",
    "emoji": "What do these mean? 🙂 👩‍👩‍👧 🏳️‍🌈 🇫🇷",
    "empty_question": "",
}

# Two requests after one system message: their common prefix ends within a page, whatever the page size.
SYSTEM = (
    "You are the librarian of a small town by the sea. You answer in two sentences at most, you never guess, and you "
    "send people to the right shelf: novels are on the ground floor, maps and charts on the first, and the archive of "
    "the harbour, with its log books since 1821, is kept in the cellar behind the green door. The reading room closes "
    "at six, except on Thursdays, when it stays open until nine."
)
SHARED = {
    "shared_maps": "Where do I find a chart of the bay?",
    "shared_logs": "Where do I find the log books of 1850?",
    "shared_hours": "Is the reading room open at eight on Thursday evening?",
}

TEXTS = {
    "one_token": "The",
    "two_tokens": "Once upon",
    "story": "The old clockmaker had never heard a silence like this one. He put down his tweezers and",
    "story_continued": (
        "The old clockmaker had never heard a silence like this one. He put down his tweezers and looked up at the "
        "wall, where forty pendulums hung still"
    ),
    "encyclopedia": "Photosynthesis is the process by which green plants",
    "history": "The printing press, invented in the fifteenth century, changed Europe because",
    "numbers": "1, 2, 4, 8, 16, 32,",
    "dates": "2021-03-01, 2021-03-02, 2021-03-03,",
    "python": 'def is_prime(n: int) -> bool:\n    """Return whether n is a prime number."""\n',
    "c": "#include <stdio.h>\n\nint main(void)\n{\n\tfor (int i = 0; i < 10; i++) {\n",
    "sql": "SELECT name, COUNT(*) AS orders\nFROM customers\nJOIN",
    "json": '{"name": "Ada", "born": 1815, "tags": ["mathematics", "engines"], "address": {',
    "html": '<!DOCTYPE html>\n<html lang="en">\n<head>\n  <title>Tide table</title>\n',
    "chinese": "今天天气很好，我们去公园",
    "russian": "Жили-были старик со старухой у самого синего моря.",
    "mixed_scripts": "naïve café — “quoted” … ½ ≠ ∑ שלום مرحبا नमस्ते 한국어 \u200b\ufeff𝔘𝔫𝔦",
    "whitespace": "a\n\n\n   b\t\t\tc    \n \n",
    "repetition": "tick tock " * 20,
}


def long_text() -> str:
    """-> a keeper's diary of about 900 tokens, whose days differ and look back at each other."""
    winds = ("north", "south-west", "east", "west by north", "south")
    skies = ("clear", "grey and low", "full of gulls", "white with snow", "dark before noon")
    ships = ("the brig Anna", "two herring boats", "no sail at all", "the mail steamer", "a barque under tow")
    notes = (
        "I cleaned the lamp and trimmed the wick.",
        "The boy carried coal up the ninety-three steps.",
        "We painted the gallery rail until the rain came.",
        "A letter from my sister says the bridge is finished.",
        "The clock runs slow; I set it by the noon gun.",
        "I mended the net that the storm had torn.",
        "There was bread, salt fish and the last of the apples.",
    )
    days = [
        f"Day {day}. Wind {winds[day * 3 % 5]}, sky {skies[day * 2 % 5]}; we saw {ships[(day + day // 5) % 5]}. "
        f"{notes[day % 7]} It was colder than on day {day - 1}."
        for day in range(1, 22)
    ]
    return "The diary of the keeper at Harrow Point.\n" + "\n".join(days) + "\nDay 22. Wind"


def prompts(tokenizer: Any) -> list[dict[str, Any]]:
    """-> the cases, each with name, text and prompt_token_ids."""
    chats = {name: [{"role": "user", "content": text}] for name, text in QUESTIONS.items()}
    for name, text in SHARED.items():
        chats[name] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    chats["second_turn"] = [
        {"role": "user", "content": "Give me a word that rhymes with 'stone'."},
        {"role": "assistant", "content": "Bone."},
        {"role": "user", "content": "And another one?"},
    ]
    texts = {
        name: tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for name, messages in chats.items()
    }
    texts |= TEXTS | {"long": long_text()}
    return [
        {"name": name, "text": text, "prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
        for name, text in texts.items()
    ]


@torch.inference_mode()
def all_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """-> logits [len(token_ids), vocabulary] of one pass without a KV cache, in the model's dtype."""
    return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


@torch.inference_mode()
def continue_greedily(model: Any, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """-> (`count` greedy tokens after `prompt`, their logits [count, vocabulary]), step by step with a KV cache."""
    output = model(input_ids=torch.tensor([prompt]), use_cache=True)
    rows = [output.logits[0, -1]]
    while len(rows) < count:
        token = rows[-1].argmax().reshape(1, 1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        rows.append(output.logits[0, -1])
    logits = torch.stack(rows)
    return logits.argmax(-1).tolist(), logits


def gaps(logits: torch.Tensor) -> torch.Tensor:
    """-> [rows]: the top logit less the second."""
    top = logits.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def top_candidates(logprobs: torch.Tensor, rng: np.random.Generator) -> dict[str, list[list[float]]]:
    """-> {prompt position: five [token id, logprob]}; position i is of the distribution that token i came from."""
    top = logprobs.topk(6, dim=-1)
    clear = np.flatnonzero(((top.values[:, :-1] - top.values[:, 1:]) > TOP_MARGIN).all(-1).numpy())
    chosen = np.sort(rng.permutation(clear)[:TOP_POSITIONS])
    return {
        str(row + 1): [[i, p] for i, p in zip(top.indices[row, :5].tolist(), rounded(top.values[row, :5]), strict=True)]
        for row in chosen
    }


def golden(model: Any, case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """-> the case with its answers. Errors: SystemExit if one pass over everything disagrees with the steps."""
    prompt = case["prompt_token_ids"]
    tokens, step_logits = continue_greedily(model, prompt, NUM_TOKENS)
    gap = gaps(step_logits)
    chosen = step_logits.log_softmax(-1)[torch.arange(NUM_TOKENS), tokens]

    sequence = prompt + tokens
    logprobs = all_logits(model, sequence)[:-1].log_softmax(-1)  # row i is of token i + 1 given tokens 0..i
    again = logprobs[len(prompt) - 1 :]
    differs = (again.argmax(-1) != torch.tensor(tokens)) & (gap > SMALL_GAP)
    noise = (again[torch.arange(NUM_TOKENS), tokens] - chosen).abs().max().item()
    if differs.any() or noise > NOISE:
        raise SystemExit(f"{case['name']}: one pass and {NUM_TOKENS} steps disagree; the logprobs by up to {noise:.1e}")

    given = len(prompt) - 1
    print(f"{case['name']}: {len(prompt)} tokens, smallest gap {gap.min():.1e}, noise {noise:.1e}", flush=True)
    return case | {
        "token_ids": tokens,
        "logprobs": rounded(chosen),
        "gaps": rounded(gap),
        "prompt_logprobs": rounded(logprobs[torch.arange(given), prompt[1:]]),
        "top": top_candidates(logprobs[:given], rng) if given else {},
    }


def check_answer(model: Any, tokenizer: Any) -> None:
    """Errors: SystemExit unless the model knows the answer: else its weights are not what they should be."""
    chat = [{"role": "user", "content": CHECK_QUESTION}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens, _ = continue_greedily(model, tokenizer(text, add_special_tokens=False)["input_ids"], 8)
    if (answer := tokenizer.decode(tokens)) != CHECK_ANSWER:
        raise SystemExit(f"{CHECK_QUESTION!r}: got {answer!r}, want {CHECK_ANSWER!r}; is the file the right one?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()

    where = {"pretrained_model_name_or_path": str(args.gguf.parent), "gguf_file": args.gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    check_answer(model, tokenizer)
    rng = np.random.default_rng(0)
    cases = [golden(model, case, rng) for case in prompts(tokenizer)]

    header = {
        "made_by": "scripts/make_goldens.py",
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in ("torch", "transformers", "gguf", "numpy", "tokenizers")},
        "dtype": "float32",
        "model": {"file": args.gguf.name, "sha256": hashlib.sha256(args.gguf.read_bytes()).hexdigest()},
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in header.items()]
    body = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    args.output.write_text("{\n" + ",\n".join(lines) + ',\n"cases": [\n' + body + "\n]\n}\n", encoding="utf-8")
    print(f"{args.output}: {len(cases)} cases, {args.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
