"""What `speculative_config` may say: the methods, the keys that each of them has, and their checks. No JAX in here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_DRAFTS = 32  # tokens that a request may have drafted in one step


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are drafted, under vLLM's names. `read_speculative_config` makes it.

    `adaptive`: requests whose drafts are not accepted often enough to be worth their time get fewer, down to none.
    `benchmark_forced_acceptance`: accept this share of all drafts, whatever the model says. Outputs are then wrong; it
    is for measuring speed with weights that mean nothing.
    """

    method: str
    num_speculative_tokens: int
    model: str | None = None  # the draft model or head, where the method has one: as EngineConfig.model
    prompt_lookup_min: int = 2  # tokens at the sequence's end that must have occurred before
    prompt_lookup_max: int = 5  # tokens that are compared; the longest match wins
    suffix_decoding_max_tree_depth: int = 24  # tokens of the longest pattern that is remembered
    suffix_decoding_max_cached_tokens: int = 1 << 18  # of finished outputs that are remembered
    suffix_decoding_min_token_prob: float = 0.1  # a draft must have followed its pattern this often
    adaptive: bool = True
    benchmark_forced_acceptance: float | None = None

    @property
    def has_head(self) -> bool:
        """-> whether drafts come from what the verifying model computes."""
        return self.method in ("eagle3", "mtp")


_COMMON = ("method", "num_speculative_tokens", "adaptive", "benchmark_forced_acceptance")
_SUFFIX = ("suffix_decoding_max_tree_depth", "suffix_decoding_max_cached_tokens", "suffix_decoding_min_token_prob")
METHODS: dict[str, tuple[str, ...]] = {  # method -> its own keys
    "ngram": ("prompt_lookup_min", "prompt_lookup_max"),
    "suffix": _SUFFIX,
    "draft_model": ("model",),
    "eagle3": ("model",),
    "mtp": (),
}
_NEEDS_MODEL = ("draft_model", "eagle3")
# Key -> type, least and largest value.
_NUMBERS: dict[str, tuple[type, float, float]] = {
    "num_speculative_tokens": (int, 1, MAX_DRAFTS),
    "prompt_lookup_min": (int, 1, 16),
    "prompt_lookup_max": (int, 1, 16),
    "suffix_decoding_max_tree_depth": (int, 2, 64),
    "suffix_decoding_max_cached_tokens": (int, 0, 1 << 26),
    "suffix_decoding_min_token_prob": (float, 0, 1),
    "benchmark_forced_acceptance": (float, 0, 1),
}


def read_speculative_config(values: Mapping[str, Any]) -> SpeculativeConfig:
    """-> the checked settings. Errors: ValueError that names the key, its value and what it may be."""
    method = values.get("method")
    if method not in METHODS:
        raise _error("method", f"must be one of {', '.join(METHODS)}, got {method!r:.80}")
    known = (*_COMMON, *METHODS[method])
    if unknown := sorted(map(str, set(values) - set(known))):
        raise _error(unknown[0], f"is not supported with method {method!r}, which has {', '.join(known)}")
    given = {key: value for key, value in values.items() if value is not None}
    if "num_speculative_tokens" not in given:
        raise _error("num_speculative_tokens", f"is missing; give 1 to {MAX_DRAFTS}")
    for key, (kind, low, high) in _NUMBERS.items():
        if key in given:
            given[key] = _number(key, given[key], kind, low, high)
    if not isinstance(given.get("adaptive", True), bool):
        raise _error("adaptive", f"must be true or false, got {given['adaptive']!r:.80}")
    model = given.get("model")
    if method in _NEEDS_MODEL and model is None:
        raise _error("model", f"is missing; method {method!r} needs the checkpoint that drafts")
    if model is not None and (not isinstance(model, str) or not model):
        raise _error("model", f"must name a checkpoint, got {model!r:.80}")
    if "prompt_lookup_max" in given:  # one of the two alone may not contradict the other's default
        given.setdefault("prompt_lookup_min", min(SpeculativeConfig.prompt_lookup_min, given["prompt_lookup_max"]))
    elif "prompt_lookup_min" in given:
        given["prompt_lookup_max"] = max(SpeculativeConfig.prompt_lookup_max, given["prompt_lookup_min"])
    config = SpeculativeConfig(**given)
    if config.prompt_lookup_min > config.prompt_lookup_max:
        bounds = f"{config.prompt_lookup_min} is more than prompt_lookup_max {config.prompt_lookup_max}"
        raise _error("prompt_lookup_min", bounds)
    return config


def _number(key: str, value: Any, kind: type, low: float, high: float) -> int | float:
    allowed = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
        raise _error(key, f"must be of type {kind.__name__}, got {value!r:.80}")
    if not low <= value <= high:
        raise _error(key, f"must be in [{low}, {high}], got {value}")
    return kind(value)


def _error(key: str, problem: str) -> ValueError:
    return ValueError(f"speculative_config: {key} {problem}")
