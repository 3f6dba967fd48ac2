"""Whether SmolLM2-135M answers 100 prompts greedily with the same tokens whoever drafts for it.

    python scripts/check_speculation.py [--model FILE.gguf] [--methods ngram suffix draft_model itself eagle3 mtp]

Draft model and heads have random weights: their drafts are hardly ever right, and must do no harm. With `itself` the
model is its own draft model: then nearly all are right. The MTP head is the last layer once more, in a folder that the
model's weights are written to, for no GGUF file has one; the folder without drafts must answer as the file does.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from engine import LLM, SamplingParams
from engine.weights.default_model import default_model
from engine.weights.load import Checkpoint, load_params, open_checkpoint

METHODS = ("ngram", "suffix", "draft_model", "itself", "eagle3", "mtp")
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


def write_with_predictor(model: Path, folder: Path) -> None:
    """Write a Llama as a folder in float32, with a layer that predicts one more token: the last again, and random."""
    checkpoint = open_checkpoint(model)
    assert isinstance(checkpoint, Checkpoint)
    config, params = checkpoint.config, jax.tree.map(np.asarray, load_params(checkpoint, "float32"))
    flat = lambda part, first: np.ascontiguousarray(part.reshape(math.prod(part.shape[:first]), -1).T)
    width, depth, group = config.hidden_size, len(config.layers), config.group
    found = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]}
    for i, p in enumerate([*params["layers"], params["layers"][-1]]):
        parts = {
            "self_attn.q_proj": flat(p["qkv"][:, :, :group], 1), "self_attn.k_proj": flat(p["qkv"][:, :, group], 1),
            "self_attn.v_proj": flat(p["qkv"][:, :, group + 1], 1), "self_attn.o_proj": flat(p["out"], 3),
            "mlp.gate_proj": flat(p["gate_up"][:, 0], 1), "mlp.up_proj": flat(p["gate_up"][:, 1], 1),
            "mlp.down_proj": flat(p["down"], 1), "input_layernorm": p["attn_norm"],
            "post_attention_layernorm": p["mlp_norm"],
        }  # fmt: skip
        found |= {f"model.layers.{i}.{name}.weight": part for name, part in parts.items()}
    shapes: dict[str, tuple[int, ...]] = {"eh_proj": (width, 2 * width)}
    shapes |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (width,))
    found |= {f"model.layers.{depth}.{name}.weight": part for name, part in tensors(shapes).items()}
    found[f"model.layers.{depth}.shared_head.head.weight"] = params["embed"].copy()
    rope = config.layers[0].rope
    assert rope is not None and config.tie_embeddings
    values = dict(
        architectures=["LlamaForCausalLM"], hidden_size=width, intermediate_size=config.intermediate_size,
        num_hidden_layers=depth, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim, vocab_size=config.vocab_size, max_position_embeddings=config.max_model_len,
        rms_norm_eps=config.norm_eps, rope_theta=rope.theta, tie_word_embeddings=True,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    save_file(found, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the GGUF file of SmolLM2-135M-Instruct, if not to be fetched")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    model = options.model or default_model()
    prompts = [task.replace("{}", subject) for task in TASKS for subject in SUBJECTS][: options.prompts]
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens, ignore_eos=True)

    def start(path: Path, **settings: Any) -> LLM:
        return LLM(
            str(path), tokenizer=str(model), dtype="float32", max_model_len=256, max_num_seqs=4,
            max_num_batched_tokens=64, **settings,
        )  # fmt: skip

    def answers(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    def compare(name: str, llm: LLM) -> bool:
        """-> whether something differs from the plain model's answers."""
        same = sum(a == b for a, b in zip(answers(llm), wanted, strict=True))
        stats = llm.get_metrics().speculation
        drafts = f"{stats.num_accepted_tokens} of {stats.num_draft_tokens} drafts right" if stats else "no drafts"
        print(f"{name:20} {same} of {len(prompts)} answers the same; {drafts}", flush=True)
        return same != len(prompts)

    plain = start(model)
    wanted, width, vocab = answers(plain), plain.core.model_config.hidden_size, plain.core.model_config.vocab_size
    del plain
    tokens = sum(map(len, wanted))
    print(f"{len(prompts)} prompts, {tokens} tokens, float32, greedy", flush=True)
    failed = False
    for method in options.methods:
        config: dict[str, Any] = dict(method=method, num_speculative_tokens=4, adaptive=False)
        with tempfile.TemporaryDirectory() as name:
            path, folder = model, Path(name)
            if method == "itself":
                config |= {"method": "draft_model", "model": str(model)}
            if method in ("draft_model", "eagle3"):
                write_drafter(method, folder, vocab, width)
                config["model"] = name
            if method == "mtp":
                write_with_predictor(model, folder)
                path = folder
                failed |= compare("its folder, no drafts", start(path))
            failed |= compare(method, start(path, speculative_config=config))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
