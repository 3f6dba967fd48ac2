"""Routing and expert products against what each family's paper or release says, written out token by token."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.models.config import MoeSpec
from engine.models.moe import mixture, route

TOKENS, HIDDEN = 37, 24
E, TOP = 12, 3
SOFTMAX = MoeSpec(E, TOP, 20, renormalize=False)
SPECS = {
    "softmax": SOFTMAX,
    "renormalized": replace(SOFTMAX, renormalize=True),
    "scaled, two shared": replace(SOFTMAX, scale=1.7, shared_size=40),
    "groups by their best": replace(SOFTMAX, num_groups=4, top_groups=2),
    "sigmoid, bias, groups by their two best": MoeSpec(
        E, TOP, 20, scoring="sigmoid", renormalize=True, scale=2.5, num_groups=4, top_groups=2, group_score_top=2,
        choice_bias=True,
    ),
    "biases, clamp": MoeSpec(E, TOP, 20, renormalize=True, router_bias=True, expert_bias=True, clamp=1.5),
    "one expert": MoeSpec(1, 1, 20, renormalize=True),
}  # fmt: skip
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def parameters(spec: MoeSpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    n, F = spec.num_experts, spec.expert_size
    p = {
        "router": draw(HIDDEN, n) / 3,
        "experts_gate_up": draw(n, HIDDEN, 2, F) / 4,
        "experts_down": draw(n, F, HIDDEN) / 4,
    }
    if spec.router_bias:
        p["router_bias"] = draw(n)
    if spec.choice_bias:
        p["choice_bias"] = draw(n) / 2
    if spec.expert_bias:
        p |= {"experts_gate_up_bias": draw(n, 2, F), "experts_down_bias": draw(n, HIDDEN)}
    if spec.shared_size:
        p |= {
            "shared_gate_up": draw(HIDDEN, 2, spec.shared_size) / 4,
            "shared_down": draw(spec.shared_size, HIDDEN) / 4,
        }
    return p


def inputs() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((TOKENS, HIDDEN)).astype(np.float32)


def run(spec: MoeSpec, x: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    valid = np.ones(len(x), bool) if valid is None else valid
    jitted = jax.jit(mixture, static_argnums=(2, 3))
    return np.asarray(jitted(jnp.asarray(x), jax.tree.map(jnp.asarray, parameters(spec)), spec, "silu", valid))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def expected(spec: MoeSpec, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """-> what one token x [HIDDEN] becomes, in float64."""
    x = x.astype(np.float64)
    logits = x @ p["router"] + p.get("router_bias", 0)
    scores = sigmoid(logits) if spec.scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    ranked = scores + p.get("choice_bias", 0)
    size = spec.num_experts // spec.num_groups
    group_score = np.sort(ranked.reshape(-1, size))[:, -spec.group_score_top :].sum(axis=1)
    groups = np.argsort(group_score)[-spec.top_groups :]
    eligible = [e for e in np.argsort(-ranked) if e // size in groups]
    chosen = eligible[: spec.top_k]
    weights = scores[chosen] / (scores[chosen].sum() if spec.renormalize else 1) * spec.scale
    out = np.zeros(HIDDEN)
    for weight, e in zip(weights, chosen, strict=True):
        gate, up = np.einsum("d,dif->if", x, p["experts_gate_up"][e])
        if spec.expert_bias:
            gate, up = gate + p["experts_gate_up_bias"][e, 0], up + p["experts_gate_up_bias"][e, 1]
        if spec.clamp is None:
            y = gate * sigmoid(gate) * up
        else:
            gate, up = np.minimum(gate, spec.clamp), np.clip(up, -spec.clamp, spec.clamp)
            y = gate * sigmoid(1.702 * gate) * (up + 1)
        out += weight * (y @ p["experts_down"][e] + (p["experts_down_bias"][e] if spec.expert_bias else 0))
    if spec.shared_size:
        gate, up = np.einsum("d,dif->if", x, p["shared_gate_up"])
        out += (gate * sigmoid(gate) * up) @ p["shared_down"]
    return out


@each_spec
def test_each_token_is_the_weighted_sum_of_its_experts(spec):
    p, x = parameters(spec), inputs()
    wanted = np.stack([expected(spec, p, row) for row in x])
    assert np.abs(run(spec, x) - wanted).max() < 2e-5 * np.abs(wanted).max()


@each_spec
def test_a_token_gives_the_same_in_any_company(spec):
    x = inputs()
    together = run(spec, x)
    for keep in (np.arange(TOKENS) == 5, np.arange(TOKENS) % 2 == 1):
        beside = np.where(keep[:, None], x, -x[::-1])
        np.testing.assert_array_equal(run(spec, beside)[keep], together[keep])


@each_spec
def test_padding_costs_nothing_and_reaches_nobody(spec):
    x, valid = inputs(), np.arange(TOKENS) < 20
    out = run(spec, np.where(valid[:, None], x, np.nan), valid)
    np.testing.assert_array_equal(out[:20], run(spec, x)[:20])
    if not spec.shared_size:
        np.testing.assert_array_equal(out[20:], 0)


def test_a_broken_token_breaks_no_other():
    x = inputs()
    broken = np.where(np.arange(TOKENS)[:, None] == 7, np.nan, x)
    out, whole = run(SOFTMAX, broken), run(SOFTMAX, x)
    others = np.arange(TOKENS) != 7
    np.testing.assert_array_equal(out[others], whole[others])
    assert np.isnan(out[7]).all()


def test_the_likeliest_expert_comes_first_and_no_expert_twice():
    logits = jnp.asarray(np.random.default_rng(3).standard_normal((50, E)), jnp.float32)
    weights, experts = map(np.asarray, route(logits, SOFTMAX))
    assert (np.diff(weights, axis=1) <= 0).all()
    assert all(len(set(row)) == TOP for row in experts.tolist())
