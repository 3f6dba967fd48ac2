"""Models and drafting heads as their published tensors define them, densely in float64: the oracle of what drafts.

They are written from the checkpoints' names and the papers: EAGLE-3 (Li et al. 2025, section 3; its authors' folders),
DeepSeek-V3 (arXiv 2412.19437, sections 2.1 and 2.2; its README_WEIGHTS). Positions count from 0, and all tokens of a
sequence are computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


class Weights:
    """Tensors below a prefix, in float64; products are stored [out, in]."""

    def __init__(self, tensors: Tensors, prefix: str = ""):
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[f"{self.prefix}{name}"], np.float64)

    def below(self, prefix: str) -> Weights:
        return Weights(self.tensors, self.prefix + prefix)

    def times(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self[f"{name}.weight"].T

    def norm(self, name: str, x: np.ndarray, eps: float) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self[f"{name}.weight"]


def rotate(x: np.ndarray, interleaved: bool) -> np.ndarray:
    """x [T, heads, d] at positions 0 to T - 1, turned in pairs: of neighbours, or of the same place in each half."""
    length, _, d = x.shape
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., : d // 2], x[..., d // 2 :])
    turn = np.exp(1j * np.arange(length)[:, None] * 10000.0 ** (-np.arange(d // 2) / (d // 2)))[:, None]
    turned = (first + 1j * second) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)  # the order is that of queries and keys alike


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """q and k [T, heads, d], v [T, heads, e] -> [T, heads * e], causally."""
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,she->the", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)


def gated(w: Weights, x: np.ndarray) -> np.ndarray:
    gate = w.times("gate_proj", x)
    return w.times("down_proj", gate / (1 + np.exp(-gate)) * w.times("up_proj", x))


def llama_attention(config: dict[str, Any], w: Weights, x: np.ndarray) -> np.ndarray:
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    split = lambda name, count: w.times(name, x).reshape(len(x), count, -1)
    several = lambda y: np.repeat(y, heads // shared, axis=1)
    q, k = rotate(split("q_proj", heads), False), rotate(split("k_proj", shared), False)
    return w.times("o_proj", attend(q, several(k), several(split("v_proj", shared))))


def latent_attention(config: dict[str, Any], w: Weights, x: np.ndarray) -> np.ndarray:
    """DeepSeek's: keys and values of all heads come from a latent, and one rotated key is everybody's."""
    heads, nope, eps = config["num_attention_heads"], config["qk_nope_head_dim"], config["rms_norm_eps"]
    q = w.times("q_b_proj", w.norm("q_a_layernorm", w.times("q_a_proj", x), eps)).reshape(len(x), heads, -1)
    down = w.times("kv_a_proj_with_mqa", x)
    latent, key = np.split(down, [config["kv_lora_rank"]], axis=-1)
    up = w.times("kv_b_proj", w.norm("kv_a_layernorm", latent, eps)).reshape(len(x), heads, -1)
    of_all = np.broadcast_to(rotate(key[:, None], True), (len(x), heads, key.shape[-1]))
    q = np.concatenate([q[..., :nope], rotate(q[..., nope:], True)], axis=-1)
    return w.times("o_proj", attend(q, np.concatenate([up[..., :nope], of_all], axis=-1), up[..., nope:]))


def experts(config: dict[str, Any], w: Weights, x: np.ndarray) -> np.ndarray:
    """DeepSeek-V3's mixture: sigmoid scores, a bias for the choice alone, groups by the sum of their best two."""
    count, groups = config["n_routed_experts"], config["n_group"]
    out = gated(w.below("shared_experts."), x)
    for t, scores in enumerate(1 / (1 + np.exp(-w.times("gate", x)))):
        ranked = (scores + w["gate.e_score_correction_bias"]).reshape(groups, -1)
        best = np.argsort(-np.sort(ranked, axis=1)[:, -2:].sum(1))[: config["topk_group"]]
        ranked = np.where(np.isin(np.arange(groups), best)[:, None], ranked, -np.inf).reshape(count)
        chosen = np.argsort(-ranked)[: config["num_experts_per_tok"]]
        for expert in chosen:
            share = scores[expert] / scores[chosen].sum() * config["routed_scaling_factor"]
            out[t] += share * gated(w.below(f"experts.{expert}."), x[t])
    return out


def layer(config: dict[str, Any], w: Weights, x: np.ndarray) -> np.ndarray:
    """One decoder layer of a Llama or a DeepSeek-V3, as its tensors say."""
    eps, is_latent = config["rms_norm_eps"], f"{w.prefix}self_attn.kv_b_proj.weight" in w.tensors
    attention = latent_attention if is_latent else llama_attention
    x = x + attention(config, w.below("self_attn."), w.norm("input_layernorm", x, eps))
    normed, mlp = w.norm("post_attention_layernorm", x, eps), w.below("mlp.")
    return x + (experts(config, mlp, normed) if f"{mlp.prefix}gate.weight" in w.tensors else gated(mlp, normed))


class Target:
    """The model that verifies."""

    def __init__(self, config: dict[str, Any], tensors: Tensors):
        self.config, self.weights, self.depth = config, Weights(tensors), config["num_hidden_layers"]

    def states(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """-> what goes into each layer, and out of the last: [T, D] each."""
        states = [self.weights["model.embed_tokens.weight"][list(tokens)]]
        for i in range(self.depth):
            states.append(layer(self.config, self.weights.below(f"model.layers.{i}."), states[-1]))
        return states

    def hidden(self, tokens: Sequence[int]) -> np.ndarray:
        """-> behind the final norm, [T, D]."""
        return self.weights.norm("model.norm", self.states(tokens)[-1], self.config["rms_norm_eps"])

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return self.weights.times("lm_head", self.hidden(tokens))


class Eagle3:
    """EAGLE-3: a layer whose attention reads the next token's embedding and, normed, what three layers read, fused."""

    def __init__(self, target: Target, config: dict[str, Any], tensors: Tensors, taps: Sequence[int]):
        self.target, self.config, self.weights, self.taps = target, config, Weights(tensors), taps

    def features(self, tokens: Sequence[int]) -> np.ndarray:
        states = self.target.states(tokens)
        return self.weights.times("fc", np.concatenate([states[tap] for tap in self.taps], axis=-1))

    def output(self, seen: np.ndarray, following: Sequence[int]) -> np.ndarray:
        eps, w = self.config["rms_norm_eps"], self.weights.below("midlayer.")
        token = self.target.weights["model.embed_tokens.weight"][list(following)]
        normed = w.norm("hidden_norm", seen, eps)
        x = np.concatenate([w.norm("input_layernorm", token, eps), normed], axis=-1)
        residual = normed if self.config.get("norm_before_residual", False) else seen
        x = residual + llama_attention(self.config, w.below("self_attn."), x)
        return x + gated(w.below("mlp."), w.norm("post_attention_layernorm", x, eps))

    def logits(self, output: np.ndarray) -> np.ndarray:
        """-> over the model's vocabulary; d2t says how far behind its own number a token of the head's is there."""
        found = self.weights.times("lm_head", self.weights.norm("norm", output, self.config["rms_norm_eps"]))
        of_model = np.full((len(output), self.target.config["vocab_size"]), -np.inf)
        of_model[:, np.arange(found.shape[1]) + self.weights.tensors["d2t"]] = found
        return of_model


class Mtp:
    """DeepSeek-V3's module for one more token: a layer of the model's own kind, of both normed and fused."""

    def __init__(self, target: Target):
        self.target, self.config = target, target.config
        self.weights = target.weights.below(f"model.layers.{target.depth}.")

    def features(self, tokens: Sequence[int]) -> np.ndarray:
        return self.target.hidden(tokens)

    def output(self, seen: np.ndarray, following: Sequence[int]) -> np.ndarray:
        eps, w = self.config["rms_norm_eps"], self.weights
        token = w.norm("enorm", w["embed_tokens.weight"][list(following)], eps)
        x = w.times("eh_proj", np.concatenate([token, w.norm("hnorm", seen, eps)], axis=-1))
        return layer(self.config, w, x)

    def logits(self, output: np.ndarray) -> np.ndarray:
        normed = self.weights.norm("shared_head.norm", output, self.config["rms_norm_eps"])
        return self.weights.times("shared_head.head", normed)


def drafts(
    head: Eagle3 | Mtp, tokens: Sequence[int], count: int, choose: Callable[[np.ndarray], int]
) -> tuple[list[int], list[np.ndarray]]:
    """-> `count` tokens behind these, and the logits [V] that each was chosen from.

    At position p a head reads the model's features of p and the token at p + 1, and tells the token at p + 2. Behind
    what the model has computed, its own output takes the features' place.
    """
    seen, following = list(head.features(tokens[:-1])), list(tokens[1:])
    chosen, found = [], []
    for _ in range(count):
        output = head.output(np.stack(seen), following)[-1]
        found.append(head.logits(output[None])[0])
        chosen.append(choose(found[-1]))
        seen.append(output)
        following.append(chosen[-1])
    return chosen, found
