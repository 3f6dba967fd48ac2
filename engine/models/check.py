"""Whether a ModelConfig that was read from a file can be a model at all: every number in range, every name known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from engine.models.config import LatentSpec, LayerSpec, ModelConfig, MoeSpec, RopeSpec
from engine.models.families import FAMILIES
from engine.models.layers import ACTIVATIONS
from engine.models.read import MAX_LAYERS, MAX_ROPE_FACTORS
from engine.models.rope import frequencies

MAX_INT = 2**31 - 1
MAX_HEAD_DIM = 1 << 14
POSITIVE = {
    "vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "max_model_len",
    "norm_eps", "attention_soft_cap", "logit_soft_cap", "window", "num_experts", "top_k", "expert_size",
    "num_groups", "top_groups", "group_score_top", "clamp", "kv_rank", "nope_dim", "rope_dim", "value_dim",
    "q_rank", "dim", "theta", "factor",
}  # fmt: skip
NAMES: dict[str, tuple[Any, ...]] = {
    "family": tuple(family.name for family in FAMILIES),
    "activation": tuple(ACTIVATIONS),
    "norm_dtype": (None, "float32"),
    "qk_norm": (None, "head", "width"),
    "scoring": ("softmax", "sigmoid"),
}


def check_config(config: ModelConfig) -> None:
    """Errors: ValueError that names the field. What a checkpoint's tensors must be follows from the config alone."""
    if not 1 <= len(config.layers) <= MAX_LAYERS:
        raise ValueError(f"layers: {len(config.layers)} are not 1 to {MAX_LAYERS}")
    for name, field, value in _fields("", config):
        if isinstance(value, str) or (value is None and field in NAMES):
            if value not in NAMES.get(field, (value,)):
                raise ValueError(f"{name}: {value!r:.80} is not one of {NAMES[field]}")
        elif isinstance(value, (int, float)):
            if not math.isfinite(value) or abs(value) > MAX_INT or (field in POSITIVE and value <= 0):
                raise ValueError(f"{name}: is out of range: {value}")
        elif isinstance(value, tuple) and len(value) > MAX_ROPE_FACTORS:
            raise ValueError(f"{name}: {len(value)} entries are more than {MAX_ROPE_FACTORS}")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(f"num_heads: {config.num_heads} are no multiple of {config.num_kv_heads} KV heads")
    if config.head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim: {config.head_dim} is more than {MAX_HEAD_DIM}")
    for layer in dict.fromkeys(config.layers):
        _check_layer(config, layer)


def _fields(prefix: str, spec: Any) -> Iterator[tuple[str, str, Any]]:
    """Yields (path, field's name, value) of everything in a spec; layers that are equal once."""
    for field in dataclasses.fields(spec):
        value, name = getattr(spec, field.name), f"{prefix}{field.name}"
        if field.name == "layers":
            first = {layer: i for i, layer in reversed(list(enumerate(value)))}
            for layer, i in first.items():
                yield from _fields(f"{name}.{i}.", layer)
        elif dataclasses.is_dataclass(value):
            yield from _fields(f"{name}.", value)
        elif isinstance(value, tuple):
            yield name, field.name, value
            for number in value:
                yield name, field.name, number
        else:
            yield name, field.name, value


def _check_layer(config: ModelConfig, layer: LayerSpec) -> None:
    if layer.rope is not None:
        _check_rope(config, layer.rope, layer.latent)
    if isinstance(moe := layer.moe, MoeSpec):
        groups = moe.num_groups
        if moe.num_experts % groups or moe.top_groups > groups or moe.group_score_top > moe.num_experts // groups:
            raise ValueError(f"layers: moe: {groups} groups do not divide {moe.num_experts} experts as they should")
        if moe.top_k > moe.num_experts // groups * moe.top_groups:
            raise ValueError(f"layers: moe: top_k {moe.top_k} is more than the experts to choose from")


def _check_rope(config: ModelConfig, rope: RopeSpec, latent: LatentSpec | None) -> None:
    width = latent.rope_dim if latent else config.head_dim
    if rope.dim % 2 or rope.dim > width:
        raise ValueError(f"layers: rope over {rope.dim} of {width} dimensions is not possible")
    try:
        with np.errstate(all="ignore"):
            found = frequencies(rope, config.max_model_len)
    except (ArithmeticError, KeyError, ValueError) as error:
        raise ValueError(f"layers: rope {rope.kind!r:.40}: {type(error).__name__}: {error}") from None
    if found.shape != (rope.dim // 2,) or not np.isfinite(found).all():
        raise ValueError(f"layers: rope {rope.kind!r:.40}: its numbers give no frequencies")
