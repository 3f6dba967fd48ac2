"""From a checkpoint to the engine's parameters, one at a time: names are mapped, products fused, dtypes changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engine.models.config import ModelConfig
from engine.models.families import Family, from_gguf, from_hugging_face
from engine.models.params import Params, ParamSpec, as_dtype, map_specs, param_specs
from engine.weights.gguf import open_gguf
from engine.weights.safetensors import open_safetensors

# Part -> its tensor in a Hugging Face folder and in a GGUF file; {} is the layer.
GLOBAL_TENSORS = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "lm_head": ("lm_head.weight", "output.weight"),
}
LAYER_TENSORS = {
    "attn_norm": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "q": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "k": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "v": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "q_bias": ("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    "k_bias": ("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    "v_bias": ("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    "q_norm": ("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    "k_norm": ("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    "out": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "gate": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "up": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "down": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
}
# Our parameter -> the parts that it is fused from, where they are not itself.
FUSED = {"qkv": ("q", "k", "v"), "qkv_bias": ("q_bias", "k_bias", "v_bias"), "gate_up": ("gate", "up")}
HF, GGUF = 0, 1


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the model it holds, and its tensors by name."""

    source: str
    config: ModelConfig
    family: Family
    style: int  # HF or GGUF: whose tensor names
    shapes: dict[str, tuple[int, ...]]
    load: Callable[[str], np.ndarray]


def open_checkpoint(path: Path) -> Checkpoint:
    """-> the checkpoint of a .gguf file or a Hugging Face folder. Errors: ValueError that names file and field."""
    if path.is_file() and path.suffix == ".gguf":
        file = open_gguf(path)
        shapes = {name: info.shape for name, info in file.tensors.items()}
        family, config = from_gguf(str(path), file.metadata, shapes)
        return Checkpoint(str(path), config, family, GGUF, shapes, file.load)
    family, config = read_config(path)
    files = open_safetensors(path)
    shapes = {name: info.shape for name, info in files.tensors.items()}
    return Checkpoint(str(path), config, family, HF, shapes, files.load)


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """-> family and config from a folder's config.json. Errors: ValueError."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model: {folder} is neither a .gguf file nor a folder with config.json")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold an object, got {type(values).__name__}")
    return from_hugging_face(str(file), values)


def load_params(checkpoint: Checkpoint, dtype: str, put: Callable[[tuple[Any, ...], np.ndarray], jax.Array]) -> Params:
    """-> the model's parameters, each handed to `put` (path, array of the ParamSpec's shape) as soon as it is read.

    Errors: ValueError that names missing, surplus or misshapen tensors.
    """
    specs = param_specs(checkpoint.config)
    _check_names(checkpoint, specs)

    def one(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
        return put(path, as_dtype(_assemble(checkpoint, path, spec), dtype))

    return map_specs(one, specs)


def _tensor_names(path: tuple[Any, ...], style: int) -> list[str]:
    """-> the checkpoint's tensors that one parameter is made of."""
    if path[0] != "layers":
        return [GLOBAL_TENSORS[path[0]][style]]
    return [LAYER_TENSORS[part][style].format(path[1]) for part in FUSED.get(path[2], (path[2],))]


def _check_names(checkpoint: Checkpoint, specs: Params) -> None:
    wanted: set[str] = set()
    map_specs(lambda path, spec: wanted.update(_tensor_names(path, checkpoint.style)), specs)
    missing = sorted(wanted - set(checkpoint.shapes))
    surplus = sorted(n for n in set(checkpoint.shapes) - wanted if not _is_neutral(n, checkpoint.config))
    for what, names in (("missing", missing), ("not part of the model", surplus)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{checkpoint.source}: tensors are {what}: {', '.join(names[:5])}{more}")


def _is_neutral(name: str, config: ModelConfig) -> bool:
    """-> whether a tensor may be there without being used: a saved rope buffer, or a tied head's copy."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def _assemble(checkpoint: Checkpoint, path: tuple[Any, ...], spec: ParamSpec) -> np.ndarray:
    """-> one parameter in its ParamSpec's layout, from tensors stored [out, in]."""
    config, name = checkpoint.config, path[-1]
    D, F = config.hidden_size, config.intermediate_size
    K, G, H = config.num_kv_heads, config.group, config.head_dim
    names = _tensor_names(path, checkpoint.style)
    bias = name == "qkv_bias"
    shapes: Iterable[tuple[int, ...]] = {
        "qkv": [(K * G * H, D), (K * H, D), (K * H, D)],
        "qkv_bias": [(K * G * H,), (K * H,), (K * H,)],
        "out": [(D, K * G * H)],
        "gate_up": [(F, D), (F, D)],
        "down": [(D, F)],
    }.get(name, [spec.shape])
    parts = []
    for tensor, shape in zip(names, shapes, strict=True):
        if checkpoint.shapes[tensor] != shape:
            raise ValueError(f"{checkpoint.source}: {tensor} has shape {checkpoint.shapes[tensor]}, expected {shape}")
        parts.append(checkpoint.load(tensor))
    if name in ("qkv", "qkv_bias"):
        if checkpoint.style == GGUF and checkpoint.family.gguf_rope_interleaved:
            parts[:2] = [_split_rope_pairs(part, H) for part in parts[:2]]
        columns = () if bias else (D,)
        fused = np.concatenate([part.reshape(K, -1, H, *columns) for part in parts], axis=1)
        return fused if bias else fused.transpose(3, 0, 1, 2)
    if name == "gate_up":
        return np.stack(parts).transpose(2, 0, 1)
    if name == "out":
        return parts[0].T.reshape(K, G, H, D)
    return parts[0].T if name == "down" else parts[0]


def _split_rope_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads * head_dim, ...] with rope pairs (2i, 2i + 1) -> the same with pairs (i, i + head_dim / 2)."""
    pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
