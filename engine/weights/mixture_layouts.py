"""Layouts of experts and of latent attention: which parts of a checkpoint's tensors their parameters are made of."""

from __future__ import annotations

from collections.abc import Callable

from engine.models.config import LatentSpec, ModelConfig
from engine.models.families import Family
from engine.weights.names import GGUF
from engine.weights.part import Part

ALL = slice(None)
Shape = tuple[int, ...]
Layout = Callable[[str, Shape, ModelConfig, Family, int], list[Part]]  # parameter, shape, ..., whose names -> parts


def _experts_gate_up(name: str, shape: Shape, config: ModelConfig, family: Family, style: int) -> list[Part]:
    """A GGUF file has a tensor [experts, out, in] for gate and one for up; a folder a pair for each expert, or one for
    all, [experts, in, out], with gate and up side by side."""
    E, D, _, F = shape
    if style != GGUF and family.packed_experts:
        return [Part(name, (E, 2 * F, D), (E, F, 2, D), (0, 3, 2, 1), shape)]
    if style != GGUF and family.fused_experts:
        return [Part(name, (E, D, 2 * F), (E, D, F, 2), (0, 1, 3, 2), shape)]
    if style == GGUF:
        return [
            Part(part, (E, F, D), (E, F, 1, D), (0, 3, 2, 1), (E, D, 1, F), (ALL, ALL, slice(i, i + 1)))
            for i, part in enumerate(("experts_gate", "experts_up"))
        ]
    return [
        Part(f"{part}.{e}", (F, D), (1, F, 1, D), (0, 3, 2, 1), (1, D, 1, F), (slice(e, e + 1), ALL, slice(i, i + 1)))
        for e in range(E)
        for i, part in enumerate(("experts_gate", "experts_up"))
    ]


def _experts_down(name: str, shape: Shape, config: ModelConfig, family: Family, style: int) -> list[Part]:
    E, F, D = shape
    if style != GGUF and family.fused_experts and not family.packed_experts:
        return [Part(name, shape, shape, (0, 1, 2), shape)]
    if style == GGUF or family.packed_experts:
        return [Part(name, (E, D, F), (E, D, F), (0, 2, 1), shape)]
    return [Part(f"{name}.{e}", (D, F), (1, D, F), (0, 2, 1), (1, F, D), (slice(e, e + 1),)) for e in range(E)]


def _experts_gate_up_bias(name: str, shape: Shape, config: ModelConfig, family: Family, style: int) -> list[Part]:
    E, _, F = shape
    if style == GGUF:
        return [
            Part(part, (E, F), (E, 1, F), (0, 1, 2), (E, 1, F), (ALL, slice(i, i + 1)))
            for i, part in enumerate(("experts_gate_bias", "experts_up_bias"))
        ]
    return [Part(name, (E, 2 * F), (E, F, 2), (0, 2, 1), shape)]


def _latent(config: ModelConfig) -> LatentSpec:
    latent = config.layers[0].latent
    assert latent is not None
    return latent


def _queries(name: str, shape: Shape, config: ModelConfig, family: Family, style: int) -> list[Part]:
    """Each head's rope pairs are side by side, behind what has no rope: (2i, 2i + 1) become (i, i + rope_dim / 2)."""
    D, N, width = shape
    nope, rope = _latent(config).nope_dim, _latent(config).rope_dim
    stored, plain, rotated = (N * width, D), slice(nope), slice(nope, None)
    pairs = slice(nope // 2, None)
    return [
        Part(name, stored, (N, width, D), (2, 0, 1), (D, N, nope), (ALL, ALL, plain), take=(ALL, plain)),
        Part(name, stored, (N, width // 2, 2, D), (3, 0, 2, 1), (D, N, rope), (ALL, ALL, rotated), take=(ALL, pairs)),
    ]


def _latent_and_key(name: str, shape: Shape, config: ModelConfig, family: Family, style: int) -> list[Part]:
    """The latent, then the rotated key that all heads share, with rope pairs side by side."""
    D, width = shape
    rank, rope = _latent(config).kv_rank, _latent(config).rope_dim
    return [
        Part(name, (width, D), (rank, D), (1, 0), (D, rank), (ALL, slice(rank)), rows=(0, rank)),
        Part(
            name, (width, D), (rope // 2, 2, D), (2, 1, 0), (D, rope), (ALL, slice(rank, None)), rows=(rank, width)
        ),
    ]  # fmt: skip


def _keys_of_latent(name: str, shape: Shape, config: ModelConfig, family: Family, style: int) -> list[Part]:
    N, nope, rank = shape
    if style == GGUF and not family.gguf_fused_latent:
        return [Part(name, (N, rank, nope), (N, rank, nope), (0, 2, 1), shape)]
    width = nope + _latent(config).value_dim
    return [Part("kv_b", (N * width, rank), (N, width, rank), (0, 1, 2), shape, take=(ALL, slice(nope)))]


def _values_of_latent(name: str, shape: Shape, config: ModelConfig, family: Family, style: int) -> list[Part]:
    N, rank, value = shape
    if style == GGUF and not family.gguf_fused_latent:
        return [Part(name, (N, value, rank), (N, value, rank), (0, 2, 1), shape)]
    width = _latent(config).nope_dim + value
    take = (ALL, slice(width - value, None))
    return [Part("kv_b", (N * width, rank), (N, width, rank), (0, 2, 1), shape, take=take)]


MIXTURE_LAYOUTS: dict[str, Layout] = {
    "experts_gate_up": _experts_gate_up,
    "experts_gate_up_bias": _experts_gate_up_bias,
    "experts_down": _experts_down,
    "q": _queries,
    "q_b": _queries,
    "kv_a": _latent_and_key,
    "k_b": _keys_of_latent,
    "v_b": _values_of_latent,
}
