"""From what a checkpoint says of its model, a config.json or GGUF metadata, to a ModelConfig: one mapping for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from engine.models.config import LatentSpec, LayerSpec, ModelConfig, RopeSpec
from engine.models.families import FAMILIES, GGUF_ROPE_TENSORS, Family
from engine.models.fields import Fields
from engine.models.layers import ACTIVATIONS
from engine.models.rope import longrope_attention_factor, yarn_attention_factor

MAX_LAYERS = 1000
MAX_ROPE_FACTORS = 1 << 12

# What GGUF files call the keys of a config.json, after the architecture's name and a dot.
GGUF_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.dimension_count": "rope_dim",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
GGUF_ROPE_KEYS = {
    "type": "rope_type",
    "factor": "factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
LAYER_TYPES = ("full_attention", "sliding_attention")


def from_hugging_face(source: str, values: dict[str, Any]) -> tuple[Family, ModelConfig]:
    """-> family and config of a parsed config.json. Errors: ValueError that names what is missing or unknown."""
    names = values.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ValueError(f"{source}: architectures must name one architecture, got {names!r:.80}")
    family = _find(source, names[0], lambda f: f.architecture)
    return family, _model_config(family, Fields(source, {**family.defaults, **values}))


def from_gguf(
    source: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], np.ndarray],
) -> tuple[Family, ModelConfig]:
    """-> family and config of a GGUF file: its metadata, its tensors' shapes, and how to load one.

    Errors: ValueError that names the key or tensor.
    """
    architecture = Fields(source, metadata)("general.architecture", str)
    family = _find(source, architecture, lambda f: f.gguf_architecture)
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{source}: tensor token_embd.weight is missing")
    keys = {**GGUF_KEYS, **family.gguf_keys}
    values = {key: metadata.get(f"{architecture}.{name}") for name, key in keys.items()}
    values["vocab_size"] = shapes["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in shapes
    values["attention_bias"] = "blk.0.attn_q.bias" in shapes
    values["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    values["rope_scaling"] = _gguf_rope_scaling(source, architecture, metadata, shapes, load)
    pattern = metadata.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        values["layer_types"] = [LAYER_TYPES[bool(slides)] for slides in pattern]
    else:
        values["sliding_window_pattern"] = pattern
    given = {key: value for key, value in values.items() if value is not None}
    if isinstance(values["sliding_window"], int) and values["sliding_window"] == 0:
        given["sliding_window"] = None  # so that no default takes its place
    shown = {key: f"{architecture}.{name}" for name, key in keys.items()}
    shown["rope_scaling"] = f"{architecture}.rope.scaling"
    if "blk.0.attn_kv_b.weight" in shapes:
        family = replace(family, gguf_fused_latent=True)
    shown["layer_types"] = shown["sliding_window_pattern"] = f"{architecture}.attention.sliding_window_pattern"
    depth = values["num_hidden_layers"]
    by_depth = family.gguf_by_depth.get(depth, {}) if isinstance(depth, int) else {}
    get = Fields(source, {**family.defaults, **family.gguf_defaults, **by_depth, **given}, shown)
    return family, _model_config(family, get)


def _find(source: str, name: str, key: Callable[[Family], str]) -> Family:
    for family in FAMILIES:
        if name and key(family) == name:
            return family
    raise ValueError(f"{source}: architecture {name!r} is not one of {sorted(key(f) for f in FAMILIES if key(f))}")


def _model_config(family: Family, get: Fields) -> ModelConfig:
    heads, hidden = get("num_attention_heads", int), get("hidden_size", int)
    kv_heads, head_dim = get("num_key_value_heads", int, heads), get("head_dim", int, hidden // heads or ...)
    latent = family.latent(get) if family.latent else None
    if latent:  # as the cache sees it: all heads share one key
        kv_heads, head_dim = 1, latent.kv_rank + latent.rope_dim
    bias = get("attention_bias", bool, False)
    if get("use_bidirectional_attention", bool, False):
        raise get.error("use_bidirectional_attention", "is not supported: every token attends to those before it")
    fields: dict[str, Any] = dict(
        family=family.name,
        vocab_size=get("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=get("intermediate_size", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=_max_model_len(get),
        layers=_layers(family, get, latent.rope_dim if latent else head_dim, latent),
        norm_eps=get("rms_norm_eps", float, 1e-6),
        activation=get("hidden_activation", str, None) or get("hidden_act", str, "silu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=get("mlp_bias", bool, False),
        attention_scale=_latent_scale(get, latent) if latent else get("query_pre_attn_scalar", float, head_dim) ** -0.5,
        attention_soft_cap=get("attn_logit_softcapping", float, None),
        embedding_scale=hidden**0.5 if family.scaled_embeddings else 1.0,
        logit_soft_cap=get("final_logit_softcapping", float, None),
        tie_embeddings=get("tie_word_embeddings", bool, False),
    )
    config = ModelConfig(**{**fields, **family.model})
    if config.num_heads % config.num_kv_heads:
        raise ValueError(f"{get.source}: {config.num_heads} heads are no multiple of {config.num_kv_heads} KV heads")
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"{get.source}: activation {config.activation!r:.80} is not one of {sorted(ACTIVATIONS)}")
    return config


def _latent_scale(get: Fields, latent: LatentSpec) -> float:
    """-> what latent attention multiplies q.k by: more in a context that YaRN stretched (DeepSeek-V2's release)."""
    scaling = _rope_scaling(get, LAYER_TYPES[False])
    all_dim = scaling("mscale_all_dim", float, 0.0, low=-1)
    stretch = scaling("factor", float, 1.0) if all_dim and _rope_kind(scaling) != "default" else 1.0
    return yarn_attention_factor(stretch, all_dim) ** 2 * (latent.nope_dim + latent.rope_dim) ** -0.5


def _layers(family: Family, get: Fields, head_dim: int, latent: LatentSpec | None) -> tuple[LayerSpec, ...]:
    count = get("num_hidden_layers", int, high=MAX_LAYERS)
    window = get("sliding_window", int, None) if get("use_sliding_window", bool, True) else None
    rotates = _rotates(get, count)
    slides = [window is not None and slide for slide in _slides(get, count)]
    ropes = {kind: _rope(get, head_dim, kind) for kind in sorted({LAYER_TYPES[slide] for slide in slides})}
    return tuple(
        LayerSpec(
            rope=ropes[LAYER_TYPES[slides[i]]] if rotates[i] else None,
            window=window if slides[i] else None,
            moe=family.moe(get, i) if family.moe else None,
            latent=latent,
        )
        for i in range(count)
    )


def _slides(get: Fields, count: int) -> list[bool]:
    """-> which layers have a sliding window: a list of types, every layer but each n-th, or all from the n-th on."""
    if get("layer_types", list, None) is not None:
        types = get.list_of("layer_types", str, count)
        if not set(types) <= set(LAYER_TYPES):
            raise get.error("layer_types", f"must be of {', '.join(LAYER_TYPES)}, got {sorted(set(types))!r:.80}")
        return [kind == LAYER_TYPES[True] for kind in types]
    every = get("sliding_window_pattern", int, None)
    if every is not None:
        return [(i + 1) % every != 0 for i in range(count)]
    if get("no_rope_layer_interval", int, None) is not None:
        return [not rotates for rotates in _rotates(get, count)]
    first = get("max_window_layers", int, 0, low=-1)
    return [i >= first for i in range(count)]


def _rotates(get: Fields, count: int) -> list[bool]:
    """-> which layers have rope: by a list of zeros and ones, or every layer but each n-th."""
    if get("no_rope_layers", list, None) is not None:
        return [bool(flag) for flag in get.list_of("no_rope_layers", int, count, low=-1)]
    every = get("no_rope_layer_interval", int, None)
    return [every is None or (i + 1) % every != 0 for i in range(count)]


def _max_model_len(get: Fields) -> int:
    """-> the longest sequence: what the config says, or what its scaling stretches the original length to."""
    longest = get("max_position_embeddings", int)
    scaling = _rope_scaling(get, LAYER_TYPES[False])
    kind, factor = _rope_kind(scaling), scaling("factor", float, 1.0)
    if kind == "dynamic":
        return max(longest, int(longest * factor))
    if kind == "yarn":
        return max(longest, int(_original_len(get, scaling) * factor))
    return longest


def _original_len(get: Fields, scaling: Fields) -> int:
    """-> the length before scaling, which some configs state beside the scaling and not in it."""
    key = "original_max_position_embeddings"
    return get(key, int, None, low=1) or scaling(key, int, get("max_position_embeddings", int), low=1)


def _rope_scaling(get: Fields, layer_type: str) -> Fields:
    """-> a config's rope_parameters or rope_scaling; transformers 5 may keep them by layer type."""
    scaling = get.nested("rope_parameters" if get("rope_parameters", dict, None) else "rope_scaling")
    by_type = any(kind in scaling.values for kind in LAYER_TYPES)
    return scaling.nested(layer_type) if by_type else scaling


_ROPE_ALIASES = {"su": "longrope", "none": "default"}  # Phi-3's first name for it, and GGUF's


def _rope_kind(scaling: Fields) -> str:
    kind: str = scaling("rope_type", str, None) or scaling("type", str, "default")
    return _ROPE_ALIASES.get(kind, kind)


def _rope(get: Fields, head_dim: int, layer_type: str) -> RopeSpec:
    """-> the rope of the layers of one type."""
    scaling = _rope_scaling(get, layer_type)
    theta = get("rope_theta", float, 10000.0, low=1)
    local = get("rope_local_base_freq", float, None, low=1)
    if local is not None and layer_type == LAYER_TYPES[True]:
        theta = local
        if layer_type not in get.nested("rope_parameters").values:
            scaling = Fields(get.source, {})  # it is of the layers that see all
    theta = scaling("rope_theta", float, theta, low=1)
    part = scaling("partial_rotary_factor", float, get("partial_rotary_factor", float, 1.0))
    dim = get("rope_dim", int, int(head_dim * part))
    if dim % 2 or not 0 < dim <= head_dim:
        raise ValueError(f"{get.source}: rope over {dim} of {head_dim} dimensions is not possible")
    return _scaled_rope(RopeSpec(dim, theta), _rope_kind(scaling), get, scaling)


def _scaled_rope(plain: RopeSpec, kind: str, get: Fields, scaling: Fields) -> RopeSpec:
    dim, theta, longest = plain.dim, plain.theta, get("max_position_embeddings", int)
    original = _original_len(get, scaling)
    factor = scaling("attention_factor", float, None)
    if kind == "default":
        return plain
    if kind == "linear":
        return RopeSpec(dim, theta, kind, scaling("factor", float))
    if kind == "dynamic":
        if dim <= 2:
            raise ValueError(f"{get.source}: dynamic rope needs more than {dim} dimensions")
        return RopeSpec(dim, theta, kind, scaling("factor", float, low=1 - 1e-9), longest)
    if kind == "llama3":
        low, high = scaling("low_freq_factor", float), scaling("high_freq_factor", float)
        if low >= high:
            raise scaling.error("high_freq_factor", f"must be more than low_freq_factor, got {high} and {low}")
        return RopeSpec(
            dim, theta, kind, scaling("factor", float), original, low_freq_factor=low, high_freq_factor=high
        )  # fmt: skip
    if kind == "yarn":
        stretch = scaling("factor", float, longest / original if longest > original else ...)
        scale, all_dim = (scaling(key, float, 0.0, low=-1e-9) for key in ("mscale", "mscale_all_dim"))
        if factor is None and scale and all_dim:
            factor = yarn_attention_factor(stretch, scale) / yarn_attention_factor(stretch, all_dim)
        return RopeSpec(
            dim, theta, kind, stretch, original,
            attention_factor=yarn_attention_factor(stretch) if factor is None else factor,
            beta_fast=scaling("beta_fast", float, 32.0), beta_slow=scaling("beta_slow", float, 1.0),
            truncate=scaling("truncate", bool, get("truncate", bool, True)),
        )  # fmt: skip
    if kind == "longrope":
        stretch = scaling("factor", float, longest / original)
        return RopeSpec(
            dim, theta, kind, original_max_len=original,
            attention_factor=longrope_attention_factor(stretch, original) if factor is None else factor,
            short_factors=scaling.list_of("short_factor", float, dim // 2),
            long_factors=scaling.list_of("long_factor", float, dim // 2),
        )  # fmt: skip
    known = "default, linear, dynamic, yarn, longrope and llama3"
    raise ValueError(f"{get.source}: rope type {kind!r:.80} is not supported; {known} are")


def _gguf_rope_scaling(
    source: str,
    architecture: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """-> a GGUF file's rope scaling, in config.json's words. Tensors say what each frequency is divided by."""
    values: dict[str, Any] = {}
    for name, key in GGUF_ROPE_KEYS.items():
        if (value := metadata.get(f"{architecture}.rope.scaling.{name}")) is not None:
            values[key] = value
    attention_factor = metadata.get(f"{architecture}.rope.scaling.attn_factor")
    log_multiplier = Fields(source, metadata)(f"{architecture}.rope.scaling.yarn_log_multiplier", float, None)
    if log_multiplier is not None:
        values["mscale"] = values["mscale_all_dim"] = 10 * log_multiplier  # a tenth is written, for both
    tensors = {}
    for name in GGUF_ROPE_TENSORS & set(shapes):
        if len(shapes[name]) != 1 or shapes[name][0] > MAX_ROPE_FACTORS:
            raise ValueError(f"{source}: tensor {name} has shape {shapes[name]}, expected a list of rope factors")
        tensors[name] = load(name).tolist()
    if "rope_freqs.weight" in tensors:  # llama3's scaling, computed when the file was written
        both = tensors["rope_freqs.weight"]
        return dict(rope_type="longrope", short_factor=both, long_factor=both, attention_factor=1.0)
    if tensors:
        short, long = tensors.get("rope_factors_short.weight"), tensors.get("rope_factors_long.weight")
        return values | dict(
            rope_type="longrope", short_factor=short, long_factor=long, attention_factor=attention_factor
        )  # fmt: skip
    if attention_factor not in (None, 1.0):
        raise ValueError(f"{source}: {architecture}.rope.scaling.attn_factor is supported beside rope factors alone")
    return values
