"""The checkpoint of what drafts: opened and checked against the model that verifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from engine.models.config import ModelConfig
from engine.models.params import Params, random_params
from engine.speculative_config import SpeculativeConfig
from engine.weights.hub import locate
from engine.weights.load import load_params, open_checkpoint, read_config


class DraftCheckpoint(NamedTuple):
    """The model that drafts, and load(dtype, seed) -> its parameters."""

    model: ModelConfig
    load: Callable[[str, int], Params]


def open_draft(spec: SpeculativeConfig, target: ModelConfig, *, dummy: bool) -> DraftCheckpoint | None:
    """-> what drafts, None where no parameters do. `dummy`: a folder's config.json is enough.

    Errors: ValueError that names the setting, or the file at fault.
    """
    if spec.model is None:
        return None
    path = locate(spec.model, weights=not dummy, setting="speculative_config: model")
    if dummy and path.is_dir():
        model, checkpoint = read_config(path), None
    else:
        checkpoint = open_checkpoint(path)
        model = checkpoint.config
    if model.vocab_size != target.vocab_size:
        sizes = f"has a vocabulary of {model.vocab_size} tokens, and the model that verifies {target.vocab_size}"
        raise ValueError(f"speculative_config: model {spec.model} {sizes}; take one with the same tokenizer")
    model = replace(model, max_model_len=target.max_model_len)

    def load(dtype: str, seed: int) -> Params:
        return random_params(model, dtype, seed) if checkpoint is None else load_params(checkpoint, dtype)

    return DraftCheckpoint(model, load)
