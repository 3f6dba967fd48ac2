"""What a model is, as data: sizes, and for each layer what its attention and its MLP do. Frozen and hashable."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding over a head's first `dim` dimensions; `rope.frequencies` says what the kinds mean.

    `attention_factor` multiplies cosine and sine. `original_max_len` is the length in tokens that the model was first
    trained for. The factors of "longrope" divide one frequency each.
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope, [dim / 2]
    long_factors: tuple[float, ...] = ()


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
    """A decoder-only transformer. Sizes are counts; `max_model_len` is the longest sequence in tokens.

    Norms: `pre_norms` before attention and MLP, `post_norms` after them, within the residual; Gemma has both.
    `qk_norm` is over each "head", or over all heads' "width". `norm_dtype` None: the model's dtype.
    """

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
    norm_dtype: str | None = None
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: str | None = None
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False
    attention_scale: float | None = None  # multiplies q.k; None: 1 / sqrt(head_dim)
    attention_soft_cap: float | None = None
    embedding_scale: float = 1.0
    logit_soft_cap: float | None = None
    tie_embeddings: bool = False
    attention_input: int | None = None  # width of what attention reads, where that is not hidden_size

    @property
    def group(self) -> int:
        """-> query heads for each KV head."""
        return self.num_heads // self.num_kv_heads
