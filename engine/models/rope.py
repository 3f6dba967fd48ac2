"""Rotary position embedding: the frequencies of every kind of scaling, and the rotation."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.models.config import RopeSpec


def frequencies(spec: RopeSpec, max_model_len: int) -> np.ndarray:
    """-> [dim / 2] float32, radians per position; computed in float64.

    - default: theta^(-2i / dim) (Su et al. 2021).
    - linear: those, divided by `factor` (position interpolation, Chen et al. 2023).
    - llama3: low ones divided by `factor`, with a smooth transition (`apply_scaling` of the Llama 3.1 release).
    - yarn: NTK by parts (Peng et al. 2023, section 3.2).
    - dynamic: theta grows with the length; longrope: short or long factors by the length (Ding et al. 2024). Both take
      max_model_len for the length, since keys stay in the cache: one set of frequencies serves all requests.
    """
    return _KINDS[spec.kind](spec, max_model_len).astype(np.float32)


def _default(spec: RopeSpec, max_model_len: int) -> np.ndarray:
    return _plain(spec.theta, spec.dim)


def _plain(theta: float, dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def _linear(spec: RopeSpec, max_model_len: int) -> np.ndarray:
    return _plain(spec.theta, spec.dim) / spec.factor


def _dynamic(spec: RopeSpec, max_model_len: int) -> np.ndarray:
    length = max(max_model_len, spec.original_max_len)
    stretch = spec.factor * length / spec.original_max_len - (spec.factor - 1)
    return _plain(spec.theta * stretch ** (spec.dim / (spec.dim - 2)), spec.dim)


def _llama3(spec: RopeSpec, max_model_len: int) -> np.ndarray:
    plain = _plain(spec.theta, spec.dim)
    turns = spec.original_max_len / (2 * math.pi) * plain  # over the original context
    keep = np.clip((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor), 0, 1)
    return keep * plain + (1 - keep) * plain / spec.factor


def _yarn(spec: RopeSpec, max_model_len: int) -> np.ndarray:
    plain = _plain(spec.theta, spec.dim)

    def index(turns: float) -> float:
        """-> which frequency turns so many times over the original context."""
        return spec.dim * math.log(spec.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = index(spec.beta_fast), index(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = np.clip((np.arange(spec.dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return (1 - ramp) * plain + ramp * plain / spec.factor


def _longrope(spec: RopeSpec, max_model_len: int) -> np.ndarray:
    factors = spec.long_factors if max_model_len > spec.original_max_len else spec.short_factors
    return _plain(spec.theta, spec.dim) / np.array(factors)


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """-> what cosine and sine are multiplied by: 0.1 mscale ln(factor) + 1 (Peng et al. 2023, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_attention_factor(factor: float, original_max_len: int) -> float:
    """-> what cosine and sine are multiplied by: sqrt(1 + ln(factor) / ln(original length)) (Ding et al. 2024)."""
    return math.sqrt(1 + math.log(factor) / math.log(original_max_len)) if factor > 1 else 1.0


def rope_tables(spec: RopeSpec, positions: Array, max_model_len: int) -> tuple[Array, Array]:
    """positions [T] -> cos, sin, each [T, dim / 2] float32."""
    angle = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies(spec, max_model_len))[None, :]
    scale = jnp.float32(spec.attention_factor)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def apply_rope(x: Array, tables: tuple[Array, Array]) -> Array:
    """x [T, ..., head_dim] rotated by its position's angles (Su et al. 2021, eq. 34), halves as pairs, in x's dtype."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (-1,)
    cos, sin = (table.reshape(shape) for table in tables)
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
