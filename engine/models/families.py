"""The model families: for each, how a checkpoint's config becomes a ModelConfig. A family is a row, not a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.models.config import LayerSpec, ModelConfig, RopeSpec
from engine.models.layers import ACTIVATIONS

MAX_LAYERS = 1000


@dataclass(frozen=True)
class Family:
    """What a family's checkpoints look like."""

    name: str
    architecture: str  # in a Hugging Face config.json's `architectures`
    gguf_architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    gguf_rope_interleaved: bool = False  # llama.cpp stores this family's q and k with rope pairs side by side


FAMILIES = (
    Family("llama", "LlamaForCausalLM", "llama", gguf_rope_interleaved=True),
    Family("mistral", "MistralForCausalLM", "", gguf_rope_interleaved=True),  # its GGUF files say "llama"
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", qkv_bias=True),
    Family("qwen3", "Qwen3ForCausalLM", "qwen3", qk_norm=True),
)


class _Fields:
    """Typed look-up in a checkpoint's config. Errors: ValueError that names the source and the key."""

    def __init__(self, source: str, values: dict[str, Any], prefix: str = ""):
        self.source, self.values, self.prefix = source, values, prefix

    def __call__(self, key: str, kind: type, default: Any = ..., *, low: float = 0, high: float = 2**40) -> Any:
        key = self.prefix + key
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.source}: {key} is missing")
            return default
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{self.source}: {key} must be of type {kind.__name__}, got {value!r:.80}")
        if kind in (int, float) and not low < value <= high:
            raise ValueError(f"{self.source}: {key} is out of range: {value}")
        return value


def from_hugging_face(source: str, values: dict[str, Any]) -> tuple[Family, ModelConfig]:
    """-> family and config of a parsed config.json. Errors: ValueError that names what is missing or unknown."""
    names = values.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ValueError(f"{source}: architectures must name one architecture, got {names!r:.80}")
    family = _find(source, names[0], lambda f: f.architecture)
    get = _Fields(source, values)
    heads, hidden = get("num_attention_heads", int), get("hidden_size", int)
    head_dim = get("head_dim", int, hidden // heads)
    if get("mlp_bias", bool, False) or (get("attention_bias", bool, False) and not family.qkv_bias):
        raise ValueError(f"{source}: attention_bias and mlp_bias are not supported for {family.name}")
    window = get("sliding_window", int, None) if get("use_sliding_window", bool, family.name == "mistral") else None
    layers = get("num_hidden_layers", int, high=MAX_LAYERS)
    first_windowed = get("max_window_layers", int, 0, low=-1) if family.name.startswith("qwen") else 0
    rope = _hugging_face_rope(source, get, head_dim)
    return family, _checked(
        source,
        ModelConfig(
            family=family.name,
            vocab_size=get("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=get("intermediate_size", int),
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", int, heads),
            head_dim=head_dim,
            max_model_len=get("max_position_embeddings", int),
            layers=tuple(LayerSpec(rope, window if i >= first_windowed else None) for i in range(layers)),
            norm_eps=get("rms_norm_eps", float, 1e-6),
            activation=get("hidden_act", str, "silu"),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            tie_embeddings=get("tie_word_embeddings", bool, False),
        ),
    )


def from_gguf(source: str, values: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> tuple[Family, ModelConfig]:
    """-> family and config of GGUF metadata and tensor shapes. Errors: ValueError that names the key."""
    architecture = _Fields(source, values)("general.architecture", str)
    family = _find(source, architecture, lambda f: f.gguf_architecture)
    get = _Fields(source, values, f"{architecture}.")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{source}: tensor token_embd.weight is missing")
    heads, hidden = get("attention.head_count", int), get("embedding_length", int)
    head_dim = get("attention.key_length", int, hidden // heads)
    scaling = get("rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"{source}: {architecture}.rope.scaling.type {scaling!r} is not supported")
    rope = RopeSpec(
        dim=get("rope.dimension_count", int, head_dim),
        theta=get("rope.freq_base", float, 10000.0),
        kind="linear" if scaling == "linear" else "default",
        factor=get("rope.scaling.factor", float, 1.0),
    )
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{source}: tensor rope_freqs.weight (scaled rope) is not supported yet")
    return family, _checked(
        source,
        ModelConfig(
            family=family.name,
            vocab_size=tensors["token_embd.weight"][0],
            hidden_size=hidden,
            intermediate_size=get("feed_forward_length", int),
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", int, heads),
            head_dim=head_dim,
            max_model_len=get("context_length", int),
            layers=(LayerSpec(rope),) * get("block_count", int, high=MAX_LAYERS),
            norm_eps=get("attention.layer_norm_rms_epsilon", float),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            tie_embeddings="output.weight" not in tensors,
        ),
    )


def _find(source: str, name: str, key: Callable[[Family], str]) -> Family:
    for family in FAMILIES:
        if name and key(family) == name:
            return family
    raise ValueError(f"{source}: architecture {name!r} is not one of {sorted(key(f) for f in FAMILIES if key(f))}")


def _hugging_face_rope(source: str, get: _Fields, head_dim: int) -> RopeSpec:
    theta = get("rope_theta", float, 10000.0)
    values = get("rope_scaling", dict, None) or get("rope_parameters", dict, None) or {}
    scaling = _Fields(source, values)
    theta = scaling("rope_theta", float, theta)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return RopeSpec(head_dim, theta)
    if kind == "linear":
        return RopeSpec(head_dim, theta, "linear", scaling("factor", float))
    if kind == "llama3":
        return RopeSpec(
            head_dim,
            theta,
            "llama3",
            scaling("factor", float),
            scaling("low_freq_factor", float),
            scaling("high_freq_factor", float),
            scaling("original_max_position_embeddings", int),
        )
    raise ValueError(f"{source}: rope type {kind!r:.80} is not supported; default, linear and llama3 are")


def _checked(source: str, config: ModelConfig) -> ModelConfig:
    if config.num_heads % config.num_kv_heads:
        raise ValueError(f"{source}: {config.num_heads} heads are no multiple of {config.num_kv_heads} KV heads")
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"{source}: activation {config.activation!r} is not one of {sorted(ACTIVATIONS)}")
    for layer in config.layers[:1]:
        if layer.rope and (layer.rope.dim % 2 or layer.rope.dim > config.head_dim):
            raise ValueError(f"{source}: rope over {layer.rope.dim} of {config.head_dim} dimensions is not possible")
    return config
