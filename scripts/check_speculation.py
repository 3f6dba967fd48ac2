"""Whether SmolLM2-135M answers 100 prompts greedily with the same tokens whoever drafts for it.

    python scripts/check_speculation.py [--model FILE.gguf] [--methods ngram suffix draft_model eagle3] [--prompts 100]

The draft model and the EAGLE-3 head have random weights: their drafts are hardly ever right, and must do no harm. An
MTP head needs a checkpoint that has one; tests/engine/speculation has a tiny model with it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from engine import LLM, SamplingParams
from engine.weights.default_model import default_model

SUBJECTS = ("the sea", "a prime number", "bread", "the moon", "rain", "a bicycle", "gold", "a whale", "music", "ice")
TASKS = (
    "Write a sentence about {}.", "What is {}?", "List three facts about {}.", "Repeat five times: {}",
    "Say why people like {}.", "Once upon a time, there was", "def {}(x):\n    return", "{}, {}, {}, {},",
    "Translate to French: {}", "A poem about {}:\n",
)  # fmt: skip


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """-> random weights, and ones for norms."""
    draw = np.random.default_rng(0)
    random = lambda shape: (draw.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
    return {name: np.ones(shape, np.float32) if len(shape) == 1 else random(shape) for name, shape in shapes.items()}


def llama_layer(prefix: str, read: int, width: int, hidden: int, heads: int, kv: int) -> dict[str, tuple[int, ...]]:
    """-> shapes of a layer's tensors; `read`: what its attention reads."""
    size = width // heads
    return {
        f"{prefix}self_attn.q_proj.weight": (width, read), f"{prefix}self_attn.k_proj.weight": (kv * size, read),
        f"{prefix}self_attn.v_proj.weight": (kv * size, read), f"{prefix}self_attn.o_proj.weight": (width, width),
        f"{prefix}mlp.gate_proj.weight": (hidden, width), f"{prefix}mlp.up_proj.weight": (hidden, width),
        f"{prefix}mlp.down_proj.weight": (width, hidden), f"{prefix}input_layernorm.weight": (width,),
        f"{prefix}post_attention_layernorm.weight": (width,),
    }  # fmt: skip


def write_drafter(method: str, folder: Path, vocab: int, width: int) -> None:
    """Write a checkpoint of random weights: a model of one narrow layer, or a head for models of this width."""
    heads, kv, hidden = (4, 2, 128) if method == "draft_model" else (9, 3, 1536)
    width = 64 if method == "draft_model" else width
    config: dict[str, Any] = dict(
        architectures=["LlamaForCausalLM"], hidden_size=width, intermediate_size=hidden, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab, max_position_embeddings=2048,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    if method == "draft_model":
        shapes = llama_layer("model.layers.0.", width, width, hidden, heads, kv)
        shapes |= {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
        found = tensors(shapes)
    else:
        config |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 1000}
        shapes = llama_layer("midlayer.", 2 * width, width, hidden, heads, kv)
        shapes |= {"fc.weight": (width, 3 * width), "midlayer.hidden_norm.weight": (width,), "norm.weight": (width,)}
        found = tensors(shapes | {"lm_head.weight": (1000, width)})
        found |= {"d2t": np.zeros(1000, np.int64), "t2d": np.arange(vocab) < 1000}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(found, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the GGUF file of SmolLM2-135M-Instruct, if not to be fetched")
    parser.add_argument("--methods", nargs="*", default=["ngram", "suffix", "draft_model", "eagle3"])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    model = str(options.model or default_model())
    prompts = [task.replace("{}", subject) for task in TASKS for subject in SUBJECTS][: options.prompts]
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens, ignore_eos=True)
    settings: dict[str, Any] = dict(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64)

    def answers(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    plain = LLM(model, **settings)
    wanted, width, vocab = answers(plain), plain.core.model_config.hidden_size, plain.core.model_config.vocab_size
    failed = False
    for method in options.methods:
        config: dict[str, Any] = dict(method=method, num_speculative_tokens=4, adaptive=False)
        with tempfile.TemporaryDirectory() as folder:
            if method in ("draft_model", "eagle3"):
                write_drafter(method, Path(folder), vocab, width)
                config["model"] = folder
            llm = LLM(model, speculative_config=config, **settings)
        same = sum(a == b for a, b in zip(answers(llm), wanted, strict=True))
        stats = llm.get_metrics().speculation
        assert stats is not None
        failed |= same != len(prompts)
        drafts = f"{stats.num_accepted_tokens} of {stats.num_draft_tokens} drafts right"
        print(f"{method:12} {same} of {len(prompts)} answers the same; {drafts}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
