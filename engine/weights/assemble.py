"""How the engine's parameters are made of a checkpoint's tensors, as data: which block of which tensor goes where."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.models.config import ModelConfig
from engine.models.families import Family
from engine.models.params import ParamSpec, map_specs, param_specs
from engine.weights.mixture_layouts import MIXTURE_LAYOUTS
from engine.weights.names import GGUF, HF, is_neutral, predictor_layers, tensor_name
from engine.weights.part import Part

Path = tuple[Any, ...]  # of a parameter, e.g. ("layers", 3, "qkv")


@dataclass(frozen=True)
class Recipe:
    """One parameter: where it is in the tree, what it must be, and the parts that fill it."""

    path: Path
    spec: ParamSpec
    parts: tuple[Part, ...]


def recipes(config: ModelConfig, family: Family, style: int) -> list[Recipe]:
    """-> how each parameter of the model is made from a checkpoint with `style`'s names (names.HF or names.GGUF)."""
    found: list[Recipe] = []
    map_specs(lambda path, spec: found.append(_recipe(config, family, style, path, spec)), param_specs(config))
    return found


def check_tensors(
    source: str, config: ModelConfig, recipes: list[Recipe], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare what a checkpoint has with what the recipes want.

    Errors: ValueError that names the tensors that are missing, surplus (nothing reads them) or misshapen.
    """
    wanted = {part.tensor: part.shape for recipe in recipes for part in recipe.parts}
    missing = sorted(set(wanted) - set(shapes))
    predictors = predictor_layers(shapes, len(config.layers))
    surplus = sorted(n for n in set(shapes) - set(wanted) if not is_neutral(n, config.tie_embeddings, predictors))
    for what, names in (("missing", missing), ("not part of the model", surplus)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{source}: tensors are {what}: {', '.join(names[:5])}{more}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ValueError(f"{source}: {name} has shape {shapes[name]}, expected {shape}")


def _recipe(config: ModelConfig, family: Family, style: int, path: Path, spec: ParamSpec) -> Recipe:
    if path[-1] in MIXTURE_LAYOUTS:
        parts = MIXTURE_LAYOUTS[path[-1]](path[-1], spec.shape, config, family, style)
        return Recipe(path, spec, tuple(replace(p, tensor=tensor_name(family, style, path, p.tensor)) for p in parts))
    layout = _LAYOUTS.get(path[-1], _as_it_is)
    parts = layout(path[-1], spec.shape, style == GGUF and family.gguf_rope_interleaved)
    offset = family.norm_offset if style == HF and path[-1].endswith("norm") else 0.0
    named = [replace(p, tensor=tensor_name(family, style, path, p.tensor), offset=offset) for p in parts]
    return Recipe(path, spec, tuple(_share_tensors(named)))


def _share_tensors(parts: list[Part]) -> Iterator[Part]:
    """Yields the parts; those whose tensors have one name are its rows, in their order."""
    rows = {part.tensor: 0 for part in parts}
    for part in parts:
        total = sum(other.shape[0] for other in parts if other.tensor == part.tensor)
        if total == part.shape[0]:
            yield part
        else:
            start, count = rows[part.tensor], part.shape[0]
            rows[part.tensor] += count
            yield replace(part, shape=(total, *part.shape[1:]), rows=(start, start + count))


# Layouts: (parameter, its shape, are rope pairs side by side?) -> parts whose `tensor` is still the part's name.
# Weights are stored [out, in], heads one after another.


def _as_it_is(name: str, shape: tuple[int, ...], paired: bool) -> list[Part]:
    return [Part(name, shape, shape, tuple(range(len(shape))), shape)]


def _flat(name: str, shape: tuple[int, ...], paired: bool) -> list[Part]:
    """A vector over all heads: what sinks and norms over the whole width are."""
    return [Part(name, (math.prod(shape),), shape, tuple(range(len(shape))), shape)]


def _transposed(name: str, shape: tuple[int, ...], paired: bool) -> list[Part]:
    return [Part(name, shape[::-1], shape[::-1], (1, 0), shape)]


def _out(name: str, shape: tuple[int, ...], paired: bool) -> list[Part]:
    K, G, H, D = shape
    return [Part(name, (D, K * G * H), (D, K, G, H), (1, 2, 3, 0), shape)]


def _gate_up(name: str, shape: tuple[int, ...], paired: bool) -> list[Part]:
    D, _, F = shape
    return [
        Part(part, (F, D), (F, 1, D), (2, 1, 0), (D, 1, F), (slice(None), slice(i, i + 1)))
        for i, part in enumerate((name.replace("gate_up", "gate"), name.replace("gate_up", "up")))
    ]


def _gate_up_bias(name: str, shape: tuple[int, ...], paired: bool) -> list[Part]:
    _, F = shape
    return [
        Part(part, (F,), (1, F), (0, 1), (1, F), (slice(i, i + 1),)) for i, part in enumerate(("gate_bias", "up_bias"))
    ]


def _qkv(name: str, shape: tuple[int, ...], paired: bool) -> list[Part]:
    *D, K, slots, H = shape  # a bias has no D
    suffix = "_bias" if name == "qkv_bias" else ""
    parts = []
    for part, first, n in (("q", 0, slots - 2), ("k", slots - 2, 1), ("v", slots - 1, 1)):
        at = (*(slice(None) for _ in D), slice(None), slice(first, first + n))
        if paired and part != "v":  # (2i, 2i + 1) become (i, i + H / 2), as apply_rope wants them
            view, order = (K, n, H // 2, 2, *D), (0, 1, 3, 2)
        else:
            view, order = (K, n, H, *D), (0, 1, 2)
        order = (*(len(order) for _ in D), *order)
        parts.append(Part(part + suffix, (K * n * H, *D), view, order, (*D, K, n, H), at))
    return parts


_LAYOUTS: dict[str, Callable[[str, tuple[int, ...], bool], list[Part]]] = {
    "qkv": _qkv,
    "qkv_bias": _qkv,
    "out": _out,
    "gate_up": _gate_up,
    "gate_up_bias": _gate_up_bias,
    "q_norm": _flat,
    "k_norm": _flat,
    "sinks": _flat,
    "down": _transposed,
    "q_a": _transposed,
    "router": _transposed,
    "shared_gate_up": _gate_up,
    "shared_down": _transposed,
}
