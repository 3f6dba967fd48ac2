"""Latent attention with absorbed projections against the same with keys and values written out for each head."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from engine.models.config import LatentSpec
from engine.models.mla import heads_output, queries_and_key

TOKENS, HIDDEN, HEADS = 7, 24, 3
EPS = 1e-6


@pytest.mark.parametrize("q_rank", [None, 10])
def test_absorbed_projections_give_what_written_out_heads_give(q_rank):
    spec = LatentSpec(kv_rank=12, nope_dim=6, rope_dim=4, value_dim=5, q_rank=q_rank)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    width = spec.nope_dim + spec.rope_dim
    p = {
        "kv_a": draw(HIDDEN, spec.kv_rank + spec.rope_dim) / 5,
        "kv_a_norm": draw(spec.kv_rank),
        "k_b": draw(HEADS, spec.nope_dim, spec.kv_rank) / 3,
        "v_b": draw(HEADS, spec.kv_rank, spec.value_dim) / 3,
        "out": draw(HEADS, 1, spec.value_dim, HIDDEN) / 4,
    }
    if q_rank is None:
        p["q"] = draw(HIDDEN, HEADS, width) / 5
    else:
        p |= {"q_a": draw(HIDDEN, q_rank) / 5, "q_a_norm": draw(q_rank), "q_b": draw(q_rank, HEADS, width) / 3}
    x, weights = draw(TOKENS, HIDDEN), rng.dirichlet(np.ones(TOKENS), (HEADS, TOKENS)).astype(np.float32)
    angle = draw(TOKENS, spec.rope_dim // 2)
    rope = np.cos(angle), np.sin(angle)

    q, k = jax.jit(queries_and_key, static_argnums=(2, 3))(x, p, spec, EPS, rope)
    attended = np.einsum("hqk,kr->qhr", weights, np.asarray(k)[:, 0, : spec.kv_rank])[:, None]
    out = jax.jit(heads_output)(attended, p)

    def norm(y, weight):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + EPS) * weight

    def rotate(y):  # [T, heads, rope_dim]
        a, b = np.split(y, 2, axis=-1)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    plain_q = np.einsum("td,dhw->thw", x, p["q"]) if q_rank is None else None
    if plain_q is None:
        plain_q = np.einsum("tr,rhw->thw", norm(x @ p["q_a"], p["q_a_norm"]), p["q_b"])
    compressed = x @ p["kv_a"]
    latent = norm(compressed[:, : spec.kv_rank], p["kv_a_norm"])
    k_rope = rotate(compressed[:, None, spec.kv_rank :])
    plain_k = np.concatenate(
        [np.einsum("tr,hnr->thn", latent, p["k_b"]), np.broadcast_to(k_rope, (TOKENS, HEADS, spec.rope_dim))], axis=-1
    )
    plain_q = np.concatenate([plain_q[..., : spec.nope_dim], rotate(plain_q[..., spec.nope_dim :])], axis=-1)
    plain_v = np.einsum("tr,hrv->thv", latent, p["v_b"])
    plain_out = np.einsum("hqk,khv,hvd->qd", weights, plain_v, p["out"][:, 0])

    scores = np.einsum("qohr,kor->hqk", np.asarray(q), np.asarray(k))
    np.testing.assert_allclose(scores, np.einsum("qhw,khw->hqk", plain_q, plain_k), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out, plain_out, rtol=1e-4, atol=1e-4)
