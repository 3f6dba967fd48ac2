"""Multi-head latent attention with absorbed projections: what is cached of a token is its latent and one rotated key.

DeepSeek-V2 (arXiv 2405.04434), section 2.1: the product of a head's query with its key, which is a projection of the
latent, is the product of the projected query with the latent itself. So all heads share one key, and the latent is
its value too; prefill and decode are the same.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from engine.models.config import LatentSpec
from engine.models.layers import project, rms_norm
from engine.models.params import Params
from engine.models.rope import apply_rope


def queries_and_key(
    x: Array, p: Params, spec: LatentSpec, eps: float, rope: tuple[Array, Array]
) -> tuple[Array, Array]:
    """x [T, D] -> queries [T, 1, heads, rank + rope_dim] and key [T, 1, rank + rope_dim].

    p: a layer's parameters as `params.param_specs` declares them; rope: `rope.rope_tables` of rope_dim dimensions.
    """
    q = (
        project(x, p["q"])
        if spec.q_rank is None
        else project(rms_norm(project(x, p["q_a"]), p["q_a_norm"], eps), p["q_b"])
    )
    q_nope, q_rope = q[..., : spec.nope_dim], apply_rope(q[..., spec.nope_dim :], rope)
    q_latent = jnp.einsum("thn,hnr->thr", q_nope, p["k_b"])
    kv = project(x, p["kv_a"])
    latent, k_rope = rms_norm(kv[:, : spec.kv_rank], p["kv_a_norm"], eps), apply_rope(kv[:, spec.kv_rank :], rope)
    q = jnp.concatenate([q_latent, q_rope], axis=-1)
    return q[:, None], jnp.concatenate([latent, k_rope], axis=-1)[:, None]


def heads_output(attended: Array, p: Params) -> Array:
    """attended [T, 1, heads, rank], weighted sums of latents -> [T, D]."""
    values = jnp.einsum("thr,hrv->thv", attended[:, 0], p["v_b"])
    return project(values[:, :, None], p["out"])
