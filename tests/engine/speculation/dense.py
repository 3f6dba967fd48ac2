"""A Llama written out densely in float64: the oracle where a test needs a model's exact distribution."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.models.config import ModelConfig


def dense_logits(config: ModelConfig, params: dict[str, Any], tokens: list[int]) -> np.ndarray:
    """-> logits [tokens, vocab] of a model with norms before, rope of the default kind, SiLU and no biases."""
    at = lambda x: np.asarray(x, np.float64)
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * at(w)
    x, length = at(params["embed"])[tokens], len(tokens)
    for layer, p in zip(config.layers, params["layers"], strict=True):
        assert layer.rope is not None
        qkv = np.einsum("td,dkgh->tkgh", norm(x, p["attn_norm"]), at(p["qkv"]))
        half = layer.rope.dim // 2
        angle = np.arange(length)[:, None] * layer.rope.theta ** (-np.arange(half) / half)[None]
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        a, b = qkv[:, :, :-1, :half], qkv[:, :, :-1, half:]
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        q, k, v = turned[:, :, :-1], turned[:, :, -1], qkv[:, :, -1]
        scores = np.einsum("tkgh,skh->kgts", q, k) / np.sqrt(config.head_dim)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("kgts,skh,kghd->td", weights, v, at(p["out"]))
        gate, up = np.einsum("td,dxf->xtf", norm(x, p["mlp_norm"]), at(p["gate_up"]))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ at(p["down"])
    return norm(x, params["final_norm"]) @ at(params["lm_head"]).T
