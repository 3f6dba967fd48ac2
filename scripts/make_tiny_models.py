"""Make tests/data/tiny: a tiny model of every family with random weights, and what transformers says of it.

    OTHER/python scripts/make_tiny_models.py

needs torch and transformers, which are no dependencies of the project. Each model is a folder as transformers saves it,
with goldens.json beside its weights: a prompt, the log-probability of each of its tokens but the first, and the greedy
tokens that follow, all in float32. Norms and biases are drawn too, so that leaving one out shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=256,
    initializer_range=0.3,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "linear-tied": transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=9, head_dim=16),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
}
PROMPT_LEN, OUTPUT_LEN = 70, 32


def main() -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter, values in model.named_parameters():
            if "norm" in parameter or "bias" in parameter:
                torch.nn.init.normal_(values, mean=1.0 if "norm" in parameter else 0.0, std=0.3)
        tokens = torch.randint(0, config.vocab_size, (1, PROMPT_LEN))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens).logits[0].double(), -1)
            for _ in range(OUTPUT_LEN):
                following = model(tokens).logits[0, -1].argmax()
                tokens = torch.cat([tokens, following.reshape(1, 1)], dim=1)
        ids = tokens[0].tolist()
        goldens = {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "prompt_token_ids": ids[:PROMPT_LEN],
            "prompt_logprobs": [round(logprobs[i, ids[i + 1]].item(), 6) for i in range(PROMPT_LEN - 1)],
            "token_ids": ids[PROMPT_LEN:],
        }
        folder = Path(__file__).parents[1] / "tests" / "data" / "tiny" / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "goldens.json").write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main()
