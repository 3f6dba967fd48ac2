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
class MoeSpec:
    """A mixture of experts in place of one MLP: each token goes to `top_k` of `num_experts`, and to the shared ones.

    `scoring` makes scores of the router's logits, "softmax" over all experts or "sigmoid" of each. `choice_bias` is
    added to them for the choice alone (DeepSeek-V3). With groups, only experts of the `top_groups` best of `num_groups`
    groups are eligible; a group is as good as the sum of its `group_score_top` best. The chosen scores are normalised
    to a sum of one if `renormalize`, then multiplied by `scale`.
    """

    num_experts: int
    top_k: int
    expert_size: int  # width of one
    shared_size: int = 0  # width of the shared experts together
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score_top: int = 1
    choice_bias: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    clamp: float | None = None  # GPT-OSS: the gate's upper limit, and the limit of up's size


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are one compressed vector a token.

    A head's query is `nope_dim` entries that meet the latent and `rope_dim` rotated ones that meet a key shared by
    all heads. `q_rank` None: queries are not compressed.
    """

    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. `window`: a token sees itself and window - 1 tokens before it; None sees all.

    `rope` None: no positions. `moe` None: one dense MLP. `latent` None: grouped-query attention.
    """

    rope: RopeSpec | None
    window: int | None = None
    moe: MoeSpec | None = None
    latent: LatentSpec | None = None


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
