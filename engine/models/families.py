"""The model families, a row of data for each: its names, its defaults, and what all of its models have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.models import mixtures
from engine.models.config import LatentSpec, MoeSpec
from engine.models.fields import Fields


@dataclass(frozen=True)
class Family:
    """What a family's checkpoints look like. `read.py` makes a ModelConfig of one; `weights/names.py` its tensor names.

    A GGUF file's keys are translated to those of a config.json first, so one set of keys and defaults serves both.
    """

    name: str
    architecture: str  # in a Hugging Face config.json's `architectures`
    gguf_architecture: str = ""  # none: llama.cpp writes another family's
    model: Mapping[str, Any] = field(default_factory=dict)  # ModelConfig's fields that no checkpoint states
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of config.json's keys, where not read.py's
    gguf_defaults: Mapping[str, Any] = field(default_factory=dict)  # of the same keys, for a GGUF file
    gguf_by_depth: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # and for one of so many layers
    gguf_keys: Mapping[str, str] = field(default_factory=dict)  # GGUF key -> config.json's, before read.GGUF_KEYS
    names: Mapping[str, str] = field(default_factory=dict)  # part -> tensor, before weights.names.TENSORS
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    gguf_rope_interleaved: bool = False  # llama.cpp stores this family's q and k with rope pairs side by side
    norm_offset: float = 0.0  # what Hugging Face's norm weights lack
    scaled_embeddings: bool = False  # by the root of hidden_size
    gguf_fused_latent: bool = (
        False  # projections of the latent to keys and values are one tensor, as in older GGUF files
    )
    fused_experts: bool = False  # a Hugging Face tensor holds all experts [experts, in, out], gate and up side by side
    packed_experts: bool = False  # and it is [experts, out, in], as MXFP4 has it
    moe: Callable[[Fields, int], MoeSpec | None] | None = None  # a layer's experts, by its index
    latent: Callable[[Fields], LatentSpec] | None = None


# Tensors of a GGUF file that belong to its config.
GGUF_ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}


def _fused(qkv: str, gate_up: str) -> dict[str, str]:
    """-> names of parts that share a tensor, one after another."""
    return {"q": qkv, "k": qkv, "v": qkv, "gate": gate_up, "up": gate_up}


_POST_NORMS = {
    "attn_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}
_GEMMA: dict[str, Any] = dict(names=_POST_NORMS, norm_offset=1.0, scaled_embeddings=True)
_GEMMA_DEFAULTS = dict(
    head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, tie_word_embeddings=True
)
_MIXTRAL_EXPERTS = {
    "router": "model.layers.{}.block_sparse_moe.gate.weight",
    "experts_gate": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "experts_up": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "experts_down": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}
_GPT_OSS = {
    "router": "model.layers.{}.mlp.router.weight",
    "router_bias": "model.layers.{}.mlp.router.bias",
    "experts_gate_up": "model.layers.{}.mlp.experts.gate_up_proj",
    "experts_gate_up_bias": "model.layers.{}.mlp.experts.gate_up_proj_bias",
    "experts_down": "model.layers.{}.mlp.experts.down_proj",
    "experts_down_bias": "model.layers.{}.mlp.experts.down_proj_bias",
}
_QWEN_DEFAULTS = dict(use_sliding_window=False, max_window_layers=28)

FAMILIES = (
    Family(
        "llama", "LlamaForCausalLM", "llama",
        defaults=dict(use_sliding_window=False),
        gguf_keys=mixtures.GGUF_EXPERT_KEYS,  # of Mixtral's files, which call themselves llama
        gguf_rope_interleaved=True,
        moe=mixtures.mixtral,
    ),
    Family("mistral", "MistralForCausalLM", gguf_rope_interleaved=True),
    Family(
        "smollm3", "SmolLM3ForCausalLM", "smollm3",
        defaults=dict(
            no_rope_layer_interval=4, rope_theta=2e6, tie_word_embeddings=True, use_sliding_window=False
        ),
        gguf_rope_interleaved=True,
    ),
    Family(
        "qwen2", "Qwen2ForCausalLM", "qwen2",
        model=dict(qkv_bias=True, out_bias=False),
        defaults=_QWEN_DEFAULTS,
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", "qwen3",
        model=dict(qk_norm="head"),
        defaults=dict(head_dim=128, **_QWEN_DEFAULTS),
    ),
    Family(
        "gemma2", "Gemma2ForCausalLM", "gemma2",
        model=dict(post_norms=True, norm_dtype="float32"),
        defaults=dict(
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096, sliding_window_pattern=2,
            **_GEMMA_DEFAULTS,
        ),
        gguf_defaults=dict(query_pre_attn_scalar=None),
        gguf_by_depth={46: dict(query_pre_attn_scalar=144)},
        **_GEMMA,
    ),
    Family(
        "gemma3", "Gemma3ForCausalLM", "gemma3",
        model=dict(qk_norm="head", post_norms=True, norm_dtype="float32"),
        defaults=dict(
            rope_theta=1e6, rope_local_base_freq=1e4, sliding_window=4096, sliding_window_pattern=6, **_GEMMA_DEFAULTS
        ),
        gguf_defaults=dict(query_pre_attn_scalar=None, sliding_window=None),
        gguf_by_depth={62: dict(query_pre_attn_scalar=168)},
        **_GEMMA,
    ),
    Family(
        "phi3", "Phi3ForCausalLM", "phi3",
        defaults=dict(rms_norm_eps=1e-5, original_max_position_embeddings=4096),
        names=_fused("model.layers.{}.self_attn.qkv_proj.weight", "model.layers.{}.mlp.gate_up_proj.weight"),
        gguf_names=_fused("blk.{}.attn_qkv.weight", "blk.{}.ffn_up.weight"),
    ),
    Family(
        "olmo2", "Olmo2ForCausalLM", "olmo2",
        model=dict(pre_norms=False, post_norms=True, qk_norm="width"),
        defaults=dict(rms_norm_eps=1e-5),
        names=_POST_NORMS,
    ),
    Family(
        "mixtral", "MixtralForCausalLM",
        defaults=dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
        names=_MIXTRAL_EXPERTS,
        moe=mixtures.mixtral,
    ),
    Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe",
        model=dict(qk_norm="head"),
        defaults=dict(head_dim=128, **_QWEN_DEFAULTS),
        gguf_defaults=dict(norm_topk_prob=True),
        gguf_keys=mixtures.GGUF_EXPERT_KEYS,
        moe=mixtures.qwen3,
    ),
    Family(
        "gpt_oss", "GptOssForCausalLM", "gpt-oss",
        model=dict(sinks=True),
        defaults=dict(
            head_dim=64, rms_norm_eps=1e-5, rope_theta=150000.0, sliding_window=128, sliding_window_pattern=2,
            attention_bias=True,
        ),
        gguf_defaults=dict(truncate=False),
        gguf_keys=mixtures.GGUF_EXPERT_KEYS,
        names=_GPT_OSS,
        gguf_names=dict(mlp_norm="blk.{}.post_attention_norm.weight"),
        fused_experts=True,
        moe=mixtures.gpt_oss,
    ),
    Family(
        "deepseek_v2", "DeepseekV2ForCausalLM", "deepseek2",
        defaults=dict(scoring_func="softmax", topk_method="greedy"),
        gguf_defaults=dict(scoring_func=None, topk_method=None),
        gguf_keys=mixtures.GGUF_DEEPSEEK_KEYS,
        moe=mixtures.deepseek,
        latent=mixtures.deepseek_latent,
    ),
    Family(
        "deepseek_v3", "DeepseekV3ForCausalLM",
        defaults=dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, first_k_dense_replace=3),
        moe=mixtures.deepseek,
        latent=mixtures.deepseek_latent,
    ),
)  # fmt: skip
