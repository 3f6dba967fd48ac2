"""What the phases of one attention call share: its static facts, its arrays, and the arithmetic of the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels.pallas.blocks import Blocks
from kernels.pallas.layout import LANES, Layout

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec

LOWEST = -1e30  # a running maximum before any score; finite, so that LOWEST - LOWEST is 0
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Call:
    """What is known when the kernel is compiled."""

    spec: AttentionSpec
    layout: Layout
    blocks: Blocks
    page_size: int
    tokens: int
    q_dtype: Any
    kv_dtype: Any
    scaled: bool
    sinks: bool

    @property
    def compute_dtype(self) -> Any:
        """What the MXU multiplies: float32 if queries or cache are, else bfloat16."""
        wide = jnp.dtype(jnp.float32) in (jnp.dtype(self.q_dtype), jnp.dtype(self.kv_dtype))
        return jnp.dtype(jnp.float32 if wide else jnp.bfloat16)

    def dot(self, a: Array, b: Array, contract: tuple[int, int]) -> Array:
        precision = jax.lax.Precision.HIGHEST if self.compute_dtype == jnp.float32 else None
        numbers = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)

    def query_factor(self, kv_scales: Any, head: int) -> Any:
        """-> what queries are multiplied with beforehand, so that their products need no more scaling."""
        factor = self.spec.scale * (LOG2_E if self.spec.soft_cap is None else 1 / self.spec.soft_cap)
        return kv_scales[0, head] * factor if self.scaled else factor

    def scores(self, q: Array, k: Array) -> Array:
        """q [M, D], already multiplied by its factor, k [N, D] -> [M, N] float32, in units of log2."""
        s = self.dot(q, k, (1, 1))
        return s if self.spec.soft_cap is None else jnp.tanh(s) * jnp.float32(self.spec.soft_cap * LOG2_E)


IN_SMEM = frozenset(("kv_lens", "cu_q_lens", "counts", "write_page", "sinks", "kv_scales"))  # of Arrays


class Arrays(NamedTuple):
    """The kernel's arguments, as refs. `out` and `cache` are its results; `cache` is the input's memory."""

    kv_lens: Any  # SMEM [S] i32
    cu_q_lens: Any  # SMEM [S + 1] i32
    counts: Any  # SMEM [2] i32: rows, decodes
    write_page: Any  # SMEM [T] i32
    sinks: Any  # SMEM [heads, group] f32, or None
    kv_scales: Any  # SMEM [2, heads] f32, or None
    table: Any  # HBM [S, 1, P] i32
    q: Any  # HBM [heads, group, T, D]
    k: Any  # HBM [heads, T, D]
    v: Any  # HBM [heads, T, D], or None where values are keys' parts
    out: Any  # HBM [heads, group, T, value_dim]
    cache: Any  # HBM [pages, channels, page_size, lanes]


def widen(x: Array, lanes: int) -> Array:
    """x [M, 128], each row one number -> [M, lanes]."""
    return x if lanes == LANES else jnp.concatenate([x] * (lanes // LANES), axis=1)


def fold(x: Array) -> Array:
    """x [M, N] -> [M, 128]: sums by lane; summing over lanes can wait until the end."""
    return reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def pad_lanes(x: Array, lanes: int) -> Array:
    """x [M, D] -> [M, lanes], with zeros."""
    if x.shape[1] == lanes:
        return x
    return jnp.concatenate([x, jnp.zeros((x.shape[0], lanes - x.shape[1]), x.dtype)], axis=1)


def first_lane(value: float | Array, shape: tuple[int, ...]) -> Array:
    """-> zeros, but `value` in lane 0: what `fold` makes of one number."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == 0, value, jnp.float32(0))
