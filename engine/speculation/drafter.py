"""Drafter: who drafts in a step, as the static argument that the step is compiled for."""

from __future__ import annotations

from typing import NamedTuple

from engine.models.config import ModelConfig
from engine.speculative_config import SpeculativeConfig


class Drafter(NamedTuple):
    """How drafts are made. `model`: of the model that makes them, where the method has one."""

    config: SpeculativeConfig
    model: ModelConfig | None = None
