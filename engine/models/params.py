"""The parameters of a model, declared once: shape and logical axes. Loading, random init and sharding start here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from engine.models.config import LatentSpec, LayerSpec, ModelConfig, MoeSpec

Params = dict[str, Any]  # a tree of arrays, in the shape of param_specs


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, a logical name for each axis, and the inputs that its random values are scaled by."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int = 0  # 0: ones, as norms start
    dtype: str | None = None  # None: the model's


def param_specs(config: ModelConfig) -> Params:
    """-> the tree of ParamSpec."""
    D, V = config.hidden_size, config.vocab_size
    specs = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), D),
        "layers": [_layer(config, layer) for layer in config.layers],
        "final_norm": _norm(config, D),
    }
    if not config.tie_embeddings:
        specs["lm_head"] = ParamSpec((V, D), ("vocab", "embed"), D)
    return specs


def _layer(config: ModelConfig, layer: LayerSpec) -> dict[str, ParamSpec]:
    attention = _latent_attention(config, layer.latent) if layer.latent else _attention(config)
    mlp = _experts(config, layer.moe) if layer.moe else _mlp(config)
    return {**attention, **mlp, **_norms(config)}


def _norm(config: ModelConfig, *shape: int, axes: tuple[str | None, ...] = (None,)) -> ParamSpec:
    return ParamSpec(shape, axes, dtype=config.norm_dtype)


def _norms(config: ModelConfig) -> dict[str, ParamSpec]:
    places = (("attn_norm", "mlp_norm"), config.pre_norms), (("attn_post_norm", "mlp_post_norm"), config.post_norms)
    return {name: _norm(config, config.hidden_size) for names, wanted in places if wanted for name in names}


def _attention(config: ModelConfig) -> dict[str, ParamSpec]:
    """Fused products keep the axis that tensor parallelism splits whole.

    qkv is [hidden, kv_heads, group + 2, head_dim]: for each KV head its query heads, then its key, then its value.
    """
    D, K, G, H = config.hidden_size, config.num_kv_heads, config.group, config.head_dim
    E = config.attention_input or D
    specs = {
        "qkv": ParamSpec((E, K, G + 2, H), ("embed", "kv_heads", "group_kv", None), E),
        "out": ParamSpec((K, G, H, D), ("kv_heads", "group", None, "embed"), K * G * H),
    }
    if config.qkv_bias:
        specs["qkv_bias"] = ParamSpec((K, G + 2, H), ("kv_heads", "group_kv", None), D)
    if config.out_bias:
        specs["out_bias"] = ParamSpec((D,), (None,), D)
    if config.qk_norm == "head":
        specs["q_norm"] = specs["k_norm"] = _norm(config, H)
    if config.qk_norm == "width":
        specs["q_norm"] = _norm(config, K, G, H, axes=("kv_heads", "group", None))
        specs["k_norm"] = _norm(config, K, H, axes=("kv_heads", None))
    if config.sinks:
        specs["sinks"] = ParamSpec((K, G), ("kv_heads", "group"), 1, "float32")
    return specs


def _mlp(config: ModelConfig) -> dict[str, ParamSpec]:
    """gate_up is [hidden, 2, intermediate]."""
    D, F = config.hidden_size, config.intermediate_size
    specs = {
        "gate_up": ParamSpec((D, 2, F), ("embed", None, "mlp"), D),
        "down": ParamSpec((F, D), ("mlp", "embed"), F),
    }
    if config.mlp_bias:
        specs["gate_up_bias"] = ParamSpec((2, F), (None, "mlp"), D)
        specs["down_bias"] = ParamSpec((D,), (None,), F)
    return specs


def _latent_attention(config: ModelConfig, latent: LatentSpec) -> dict[str, ParamSpec]:
    """kv_a makes the latent and the rotated key of a token, k_b and v_b each head's key and value of the latent.

    q and q_b are [.., heads, nope_dim + rope_dim], kv_a is [hidden, kv_rank + rope_dim].
    """
    D, N, R, V = config.hidden_size, config.num_heads, latent.kv_rank, latent.value_dim
    width = latent.nope_dim + latent.rope_dim
    specs = {
        "kv_a": ParamSpec((D, R + latent.rope_dim), ("embed", None), D),
        "kv_a_norm": _norm(config, R),
        "k_b": ParamSpec((N, latent.nope_dim, R), ("heads", None, None), R),
        "v_b": ParamSpec((N, R, V), ("heads", None, None), R),
        "out": ParamSpec((N, 1, V, D), ("heads", None, None, "embed"), N * V),
    }
    if latent.q_rank is None:
        return specs | {"q": ParamSpec((D, N, width), ("embed", "heads", None), D)}
    return specs | {
        "q_a": ParamSpec((D, latent.q_rank), ("embed", None), D),
        "q_a_norm": _norm(config, latent.q_rank),
        "q_b": ParamSpec((latent.q_rank, N, width), (None, "heads", None), latent.q_rank),
    }


def _experts(config: ModelConfig, moe: MoeSpec) -> dict[str, ParamSpec]:
    """Experts are the first axis of their weights. The router is float32: its choice must not hang on rounding."""
    D, E, F, S = config.hidden_size, moe.num_experts, moe.expert_size, moe.shared_size
    specs = {
        "router": ParamSpec((D, E), ("embed", None), D, "float32"),
        "experts_gate_up": ParamSpec((E, D, 2, F), ("experts", "embed", None, "mlp"), D),
        "experts_down": ParamSpec((E, F, D), ("experts", "mlp", "embed"), F),
    }
    if moe.router_bias:
        specs["router_bias"] = ParamSpec((E,), (None,), D, "float32")
    if moe.choice_bias:
        specs["choice_bias"] = ParamSpec((E,), (None,), E, "float32")
    if moe.expert_bias:
        specs["experts_gate_up_bias"] = ParamSpec((E, 2, F), ("experts", None, "mlp"), D)
        specs["experts_down_bias"] = ParamSpec((E, D), ("experts", "embed"), F)
    if S:
        specs["shared_gate_up"] = ParamSpec((D, 2, S), ("embed", None, "mlp"), D)
        specs["shared_down"] = ParamSpec((S, D), ("mlp", "embed"), S)
    return specs


def map_specs(function: Callable[[tuple[Any, ...], ParamSpec], Any], specs: Params) -> Params:
    """-> the tree with function(path, spec) at each leaf; a path is e.g. ("layers", 3, "qkv")."""
    walk = lambda path, spec: function(tuple(getattr(k, "key", getattr(k, "idx", None)) for k in path), spec)
    return jax.tree_util.tree_map_with_path(walk, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def num_bytes(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
