"""The oracle of the kernels' tests: each operation written out densely, without regard to speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec, sinks: np.ndarray | None = None
) -> np.ndarray:
    """The last Q tokens of one sequence attend causally to all L of it, in float64.

    q [Q, K, G, D], k and v [L, K, D], sinks [K, G] -> [Q, K, G, D]; with spec.value_dim, v is read from k.
    """
    if spec.value_dim is not None:
        v = k[..., : spec.value_dim]
    num_queries, length = q.shape[0], k.shape[0]
    scores = np.einsum("qkgd,lkd->kgql", q.astype(np.float64), k.astype(np.float64)) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    query, key = np.arange(length - num_queries, length)[:, None], np.arange(length)[None, :]
    visible = key <= query
    if spec.window is not None:
        visible &= key > query - spec.window
    scores = np.where(visible, scores, -np.inf)
    if sinks is not None:  # one more key, whose value is zero
        column = np.broadcast_to(sinks[:, :, None, None], (*scores.shape[:-1], 1))
        scores = np.concatenate([scores, column], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    weights = weights[..., :length]
    return np.einsum("kgql,lkd->qkgd", weights, v.astype(np.float64))
