"""The parameters of a model, declared once: shape and logical axes. Loading, random init and sharding start here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from engine.models.config import ModelConfig

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
        "layers": [{**_attention(config), **_mlp(config), **_norms(config)} for _ in config.layers],
        "final_norm": _norm(config, D),
    }
    if not config.tie_embeddings:
        specs["lm_head"] = ParamSpec((V, D), ("vocab", "embed"), D)
    return specs


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
    specs = {
        "qkv": ParamSpec((D, K, G + 2, H), ("embed", "kv_heads", None, None), D),
        "out": ParamSpec((K, G, H, D), ("kv_heads", None, None, "embed"), K * G * H),
    }
    if config.qkv_bias:
        specs["qkv_bias"] = ParamSpec((K, G + 2, H), ("kv_heads", None, None), D)
    if config.out_bias:
        specs["out_bias"] = ParamSpec((D,), (None,), D)
    if config.qk_norm == "head":
        specs["q_norm"] = specs["k_norm"] = _norm(config, H)
    if config.qk_norm == "width":
        specs["q_norm"] = _norm(config, K, G, H, axes=("kv_heads", None, None))
        specs["k_norm"] = _norm(config, K, H, axes=("kv_heads", None))
    if config.sinks:
        specs["sinks"] = ParamSpec((K, G), ("kv_heads", None), 1, "float32")
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


def map_specs(function: Callable[[tuple[Any, ...], ParamSpec], Any], specs: Params) -> Params:
    """-> the tree with function(path, spec) at each leaf; a path is e.g. ("layers", 3, "qkv")."""
    walk = lambda path, spec: function(tuple(getattr(k, "key", getattr(k, "idx", None)) for k in path), spec)
    return jax.tree_util.tree_map_with_path(walk, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def num_bytes(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def random_params(config: ModelConfig, dtype: str, seed: int) -> Params:
    """-> parameters of the right shapes drawn from N(0, 1 / fan_in), on the default device; norms are ones."""
    specs = param_specs(config)

    def draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
        kind = spec.dtype or dtype
        if not spec.fan_in:
            return jnp.ones(spec.shape, kind)
        return jax.random.normal(key, spec.shape, kind) * jnp.asarray(1 / math.sqrt(spec.fan_in), kind)

    draw = jax.jit(draw, static_argnums=0)
    keys = iter(jax.random.split(jax.random.key(seed), sum(1 for _ in jax.tree.leaves(specs, is_leaf=_is_spec))))
    return map_specs(lambda path, spec: draw(spec, next(keys)), specs)


def _is_spec(node: Any) -> bool:
    return isinstance(node, ParamSpec)
