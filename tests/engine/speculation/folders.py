"""Folders with tiny models and drafting heads of random weights, in their published layouts."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.engine.speculation.layouts import Tensors

TINY_DEEPSEEK = pathlib.Path(__file__).parents[2] / "data" / "tiny" / "deepseek-v3"
VOCAB, DRAFT_VOCAB, WIDTH, MIDDLE = 64, 40, 32, 48
LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], hidden_size=WIDTH, intermediate_size=MIDDLE, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=VOCAB, max_position_embeddings=128,
    rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip


def write(folder: pathlib.Path, config: dict[str, Any], tensors: Tensors) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def layer_shapes(config: dict[str, Any], read: int) -> dict[str, tuple[int, ...]]:
    """-> a Llama layer's tensors; `read`: what its attention reads."""
    width, middle, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, shared = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        "self_attn.q_proj.weight": (heads, read), "self_attn.k_proj.weight": (shared, read),
        "self_attn.v_proj.weight": (shared, read), "self_attn.o_proj.weight": (width, heads),
        "mlp.gate_proj.weight": (middle, width), "mlp.up_proj.weight": (middle, width),
        "mlp.down_proj.weight": (width, middle), "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }  # fmt: skip


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """-> random tensors: products keep a vector's size about as it is, norms weigh by 0.5 to 1.5."""
    rng = np.random.default_rng(seed)
    normal = lambda shape: rng.normal(size=shape) / np.sqrt(shape[-1])
    made = {name: normal(shape) if len(shape) > 1 else 0.5 + rng.random(shape) for name, shape in shapes.items()}
    return {name: array.astype(np.float32) for name, array in made.items()}


def llama(config: dict[str, Any]) -> Tensors:
    """-> a Llama's tensors."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width), "model.norm.weight": (width,)
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes(config, width).items()}
    return draw(shapes, seed=1)


def eagle3(target: dict[str, Any], vocab: int = DRAFT_VOCAB, **changes: Any) -> tuple[dict[str, Any], Tensors]:
    """-> config and tensors of a head for a Llama; its `vocab` tokens are a random part of the model's."""
    config = target | dict(
        architectures=["LlamaForCausalLMEagle3"], num_hidden_layers=1, draft_vocab_size=vocab, **changes
    )
    width = config["hidden_size"]
    shapes = {f"midlayer.{name}": shape for name, shape in layer_shapes(config, 2 * width).items()}
    shapes |= {"fc.weight": (width, 3 * width), "midlayer.hidden_norm.weight": (width,), "norm.weight": (width,)}
    tensors = draw(shapes | {"lm_head.weight": (vocab, width)}, seed=2)
    ids = np.sort(np.random.default_rng(3).choice(target["vocab_size"], vocab, replace=False))
    told = {"d2t": ids - np.arange(vocab), "t2d": np.isin(np.arange(target["vocab_size"]), ids)}
    return config, tensors | told


def predictor(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """-> what a layer that predicts one more token has beside the layer itself, with the model's own embedding."""
    width, prefix = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}."
    norms = dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), (width,))
    own = draw({"eh_proj.weight": (width, 2 * width), **norms}, seed=4)
    own["shared_head.head.weight"] = draw({"head": (config["vocab_size"], width)}, seed=5)["head"]
    own["embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    return {prefix + name: tensor for name, tensor in own.items()}


def deepseek() -> tuple[dict[str, Any], Tensors]:
    """-> config and tensors of the tiny DeepSeek-V3 with a layer behind its last, which is the last's plus noise."""
    config = json.loads((TINY_DEEPSEEK / "config.json").read_text())
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    tensors, depth = load_file(TINY_DEEPSEEK / "model.safetensors"), config["num_hidden_layers"]
    rng, last, behind = np.random.default_rng(6), f"model.layers.{depth - 1}.", f"model.layers.{depth}."
    more = {
        name.replace(last, behind): tensor + rng.normal(size=tensor.shape).astype(np.float32) * tensor.std()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    return config, tensors | more | predictor(config, tensors)
