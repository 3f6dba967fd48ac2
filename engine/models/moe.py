"""Mixture of experts: which experts a token goes to and with what weights, and their products, sorted by expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from engine.models.config import MoeSpec
from engine.models.layers import ACTIVATIONS, gated_mlp
from engine.models.mixtures import CLAMPED_SLOPE
from engine.models.params import Params
from kernels.grouped import grouped_dot, num_groups
from sharding.axes import ALONE, Axis

TINY = 1e-20  # what weights are divided by at least


def mixture(x: Array, p: Params, spec: MoeSpec, activation: str, valid: Array, axis: Axis = ALONE.model) -> Array:
    """x [T, D], valid [T] bool -> [T, D]: each token's experts, weighted, and those that all tokens share.

    p: a layer's parameters as `params.param_specs` declares them. Tokens that are not valid go to no expert. Where
    devices share a layer, each has some of the experts, or a part of each one's width, and the sum over them is whole.
    """
    with jax.named_scope("router"):
        logits = jnp.matmul(x.astype(jnp.float32), p["router"], precision=jax.lax.Precision.HIGHEST)
        if spec.router_bias:
            logits = logits + p["router_bias"][None]
        weights, experts = route(logits, spec, p.get("choice_bias"))
    with jax.named_scope("experts"):
        held = num_groups(p["experts_gate_up"])
        if held < spec.num_experts:
            own = experts - axis.index() * held
            experts = jnp.where((own >= 0) & (own < held), own, held)
        elif spec.expert_bias and axis.size > 1:  # a part of each width, but one bias
            p = p | {"experts_down_bias": jnp.where(axis.index() == 0, p["experts_down_bias"], 0)}
        out = expert_products(x, weights, jnp.where(valid[:, None], experts, held), p, spec, activation)
    if spec.shared_size:
        with jax.named_scope("shared_experts"):
            out = out + gated_mlp(x, p["shared_gate_up"], p["shared_down"], activation, None, None)
    return out


def route(logits: Array, spec: MoeSpec, choice_bias: Array | None = None) -> tuple[Array, Array]:
    """logits [T, E] float32 -> weights [T, top_k] float32 and experts [T, top_k] i32, the likeliest first.

    choice_bias [E] float32: what is added to the scores for the choice alone (DeepSeek-V3, section 2.1.2).
    """
    scores = jax.nn.softmax(logits, axis=-1) if spec.scoring == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if choice_bias is None else scores + choice_bias[None]
    if spec.num_groups > 1:
        ranked = jnp.where(_allowed(ranked, spec), ranked, -jnp.inf)
    _, experts = jax.lax.top_k(ranked, spec.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if spec.renormalize:
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), TINY)
    return weights * spec.scale, experts


def _allowed(scores: Array, spec: MoeSpec) -> Array:
    """-> [T, E] bool: the experts of each token's best groups (DeepSeek-V2, section 2.2.2), neighbours in groups.

    A group counts as the sum of its `group_score_top` largest scores.
    """
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, spec.num_groups, -1)
    best = jax.lax.top_k(grouped, spec.group_score_top)[0].sum(axis=-1)
    _, groups = jax.lax.top_k(best, spec.top_groups)
    allowed = jnp.zeros_like(best, bool).at[jnp.arange(tokens)[:, None], groups].set(True)
    return jnp.repeat(allowed, experts // spec.num_groups, axis=1)


def expert_products(x: Array, weights: Array, experts: Array, p: Params, spec: MoeSpec, activation: str) -> Array:
    """x [T, D], weights [T, top_k] float32, experts [T, top_k] i32 -> their weighted sum [T, D].

    There are as many experts as p has; one beyond them is none. Pairs of token and expert are sorted by expert,
    multiplied group by group and put back.
    """
    tokens, top_k = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    expert_of = flat[order]
    E = num_groups(p["experts_gate_up"])
    ends = jnp.searchsorted(expert_of, jnp.arange(E), side="right", method="scan_unrolled")  # a scatter-add is slower
    sizes = jnp.diff(ends, prepend=0)
    y = grouped_dot(x[order // top_k], p["experts_gate_up"], sizes, tokens)
    if spec.expert_bias:
        y = y + p["experts_gate_up_bias"].at[expert_of].get(mode="clip")
    y = grouped_dot(gated(y, spec, activation), p["experts_down"], sizes, tokens)
    if spec.expert_bias:
        y = y + p["experts_down_bias"].at[expert_of].get(mode="clip")
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]), unique_indices=True)
    y = weights[..., None].astype(x.dtype) * y[place].reshape(tokens, top_k, -1)
    return jnp.where(experts[..., None] < E, y, 0).sum(axis=1)


def gated(y: Array, spec: MoeSpec, activation: str) -> Array:
    """y [..., 2, F], gate and up -> [..., F]. With spec.clamp: GPT-OSS's, whose up half has an offset of one."""
    gate, up = y[..., 0, :], y[..., 1, :]
    if spec.clamp is None:
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, spec.clamp), jnp.clip(up, -spec.clamp, spec.clamp)
    return gate * jax.nn.sigmoid(CLAMPED_SLOPE * gate) * (up + 1)
