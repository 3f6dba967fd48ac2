"""What a model is, as data: sizes, and for each layer what its attention and its MLP do. Frozen and hashable."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding over `dim` dimensions in half-split layout.

    kind "default": frequencies theta^(-2i/dim) (Su et al. 2021). "linear": positions divided by `factor`.
    "llama3": low frequencies divided by `factor`, smooth in between (Llama 3.1 release, `apply_scaling`).
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_len: int = 0


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. `window`: a token sees itself and window - 1 tokens before it; None sees all."""

    rope: RopeSpec | None
    window: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are counts; `max_model_len` is in tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float = 1e-6
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False

    @property
    def group(self) -> int:
        """-> query heads for each KV head."""
        return self.num_heads // self.num_kv_heads
