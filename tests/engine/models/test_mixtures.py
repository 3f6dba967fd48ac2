"""What configs say of experts and latent attention: each key has its effect, and what is not supported is refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from engine.models.config import LatentSpec, ModelConfig, MoeSpec
from engine.models.params import param_specs
from engine.models.read import from_gguf, from_hugging_face

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny"


def read(name: str, **changes: Any) -> ModelConfig:
    """-> the config of a tiny model with some keys changed, or dropped where they are None."""
    values = json.loads((TINY / name / "config.json").read_text()) | changes
    return from_hugging_face("config.json", {key: value for key, value in values.items() if value is not None})[1]


def moe(config: ModelConfig, layer: int = -1) -> MoeSpec:
    spec = config.layers[layer].moe
    assert spec is not None
    return spec


def has_experts(config: ModelConfig) -> list[bool]:
    return [layer.moe is not None for layer in config.layers]


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("mixtral", {}, [True, True, True]),
        ("qwen3-moe", {}, [True, True, True]),
        ("qwen3-moe", {"decoder_sparse_step": 2}, [False, True, False]),
        ("qwen3-moe", {"mlp_only_layers": [0, 2]}, [False, True, False]),
        ("deepseek-v3", {}, [False, True, True]),
        ("deepseek-v3", {"first_k_dense_replace": 2}, [False, False, True]),
        ("deepseek-v3", {"first_k_dense_replace": 0, "moe_layer_freq": 2}, [True, False, True]),
        ("deepseek-v2", {"n_routed_experts": None}, [False, False, False]),
    ],
)
def test_experts_are_in_the_layers_that_the_config_says(name: str, changes: dict, layers: list[bool]):
    config = read(name, **changes)
    assert has_experts(config) == layers
    found = ["router" in layer for layer in param_specs(config)["layers"]]
    assert found == layers == [not dense for dense in ("gate_up" in layer for layer in param_specs(config)["layers"])]


def test_routing_is_the_familys():
    assert moe(read("mixtral")) == MoeSpec(6, 2, 24)
    assert moe(read("qwen3-moe")) == MoeSpec(8, 3, 16)
    assert moe(read("qwen3-moe", norm_topk_prob=None)) == MoeSpec(8, 3, 16, renormalize=False)
    assert moe(read("qwen3-moe", num_local_experts=None, num_experts=8)) == MoeSpec(8, 3, 16)
    assert moe(read("gpt-oss")) == MoeSpec(4, 2, 32, router_bias=True, expert_bias=True, clamp=7)
    assert moe(read("gpt-oss", swiglu_limit=1.5)).clamp == 1.5
    assert moe(read("gpt-oss", swiglu_limit=None)).clamp == 7
    v2 = MoeSpec(8, 3, 16, 32, renormalize=False, scale=1.5, num_groups=4, top_groups=2)
    assert moe(read("deepseek-v2")) == v2
    greedy = MoeSpec(8, 3, 16, 32, renormalize=False, scale=1.5)
    assert moe(read("deepseek-v2", topk_method="greedy")) == greedy
    assert moe(read("deepseek-v2", topk_method=None)) == greedy
    assert moe(read("deepseek-v2", n_shared_experts=None)).shared_size == 0
    v3 = MoeSpec(
        8, 3, 16, 32, "sigmoid", scale=2.5, num_groups=4, top_groups=2, group_score_top=2, choice_bias=True
    )  # fmt: skip
    assert moe(read("deepseek-v3")) == v3
    assert moe(read("deepseek-v3", scoring_func="sigmoid", topk_method="noaux_tc")) == v3
    assert moe(read("deepseek-v3", scoring_func="softmax")).scoring == "softmax"


def test_latent_attention_has_one_key_for_all_heads_and_a_scale_of_its_own():
    config = read("deepseek-v3")
    assert config.layers[0].latent == LatentSpec(16, 12, 8, 10, q_rank=20)
    assert (config.num_kv_heads, config.group, config.head_dim) == (1, 4, 24)
    plain = read("deepseek-v3", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    assert plain.attention_scale == pytest.approx(20**-0.5)
    assert config.attention_scale == pytest.approx((0.1 * np.log(8) + 1) ** 2 * 20**-0.5)
    assert read("deepseek-v2").layers[0].latent == LatentSpec(16, 12, 8, 10)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7, but only 6 experts are eligible"),
        ("mixtral", {"num_local_experts": 10**6}, "num_local_experts is out of range: 1000000"),
        ("qwen3-moe", {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ("gpt-oss", {"swiglu_alpha": 1.5}, "swiglu_alpha is not supported other than as 1.702"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob is not supported with topk_method group_limited"),
        ("deepseek-v2", {"topk_method": "best"}, "topk_method 'best' is not supported; greedy, group_limited"),
        ("deepseek-v2", {"attention_bias": True}, "attention_bias is not supported with latent attention"),
        ("deepseek-v3", {"scoring_func": "tanh"}, "scoring_func 'tanh' is not supported; softmax and sigmoid are"),
        ("deepseek-v3", {"n_group": 3}, "n_group 3, of which 2 count, does not fit 8 experts"),
        ("deepseek-v3", {"topk_group": 5}, "n_group 4, of which 5 count, does not fit 8 experts"),
        ("deepseek-v3", {"n_group": 8}, "n_group 8, of which 2 count, does not fit 8 experts"),
        ("deepseek-v3", {"topk_group": 1}, "num_experts_per_tok is 3, but only 2 experts are eligible"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave must be true"),
        ("deepseek-v3", {"qk_nope_head_dim": 11}, "qk_nope_head_dim and qk_rope_head_dim must be even, got 11 and 8"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
    ],
)
def test_what_is_not_possible_or_not_supported_is_refused_by_name(name: str, changes: dict, message: str):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read(name, **changes)


def test_a_gguf_files_scoring_must_be_known():
    sizes = {
        "block_count": 1, "embedding_length": 32, "feed_forward_length": 48, "context_length": 256,
        "attention.head_count": 4, "attention.kv_lora_rank": 16, "rope.dimension_count": 8,
        "attention.key_length_mla": 20, "attention.value_length_mla": 10, "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 16, "expert_gating_func": 7,
    }  # fmt: skip
    metadata = {"general.architecture": "deepseek2"} | {f"deepseek2.{key}": value for key, value in sizes.items()}
    with pytest.raises(ValueError, match="x.gguf: deepseek2.expert_gating_func 7 is not one of"):
        from_gguf("x.gguf", metadata, {"token_embd.weight": (60, 32)}, np.zeros)
