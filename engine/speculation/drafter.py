"""Drafter: who drafts in a step, as the static argument that the step is compiled for."""

from __future__ import annotations

from typing import NamedTuple

from engine.models.config import ModelConfig
from engine.speculative_config import SpeculativeConfig


class Drafter(NamedTuple):
    """How drafts are made. `model`: of the model that makes them, where the method has one."""

    config: SpeculativeConfig
    model: ModelConfig | None = None
    taps: tuple[int, ...] = ()  # EAGLE-3: the layers whose input it reads
    norm_before_residual: bool = False  # EAGLE-3: whether its residual is what its norm makes of that
    scaled: bool = False  # whether its layers have scales of keys and values

    @property
    def has_head(self) -> bool:
        """-> whether drafts come from what the verifying model computes."""
        return self.config.has_head
