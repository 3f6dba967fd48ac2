"""What a checkpoint says of its model is checked key by key, and refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from engine.models.read import from_gguf, from_hugging_face

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
    max_position_embeddings=128,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, "architecture 'BertModel' is not one of"),
        ({"architectures": None}, "architectures must name one architecture"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be of type int"),
        ({"hidden_size": -32}, "hidden_size is out of range"),
        ({"num_key_value_heads": 3}, "4 heads are no multiple of 3 KV heads"),
        ({"hidden_act": "relu6"}, "activation 'relu6' is not one of"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers is out of range"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope type 'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}, "rope_scaling: factor is out of range"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1]}},
            "short_factor must have 4 entries, got 2",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 1, 1, 0], "long_factor": [1] * 4}},
            r"short_factor\[3\] is out of range: 0",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor must be more than low_freq_factor",
        ),
        ({"num_attention_heads": 64}, "head_dim is missing"),
        ({"rope_theta": 1}, "rope_theta is out of range"),
        ({"partial_rotary_factor": 0.1}, "rope over 0 of 8 dimensions is not possible"),
        ({"partial_rotary_factor": 0.4}, "rope over 3 of 8 dimensions is not possible"),
        ({"layer_types": ["full_attention"]}, "layer_types must have 2 entries, got 1"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types must be of full_attention"),
        ({"no_rope_layers": [1, "x"]}, r"no_rope_layers\[1\] must be of type int"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
    ],
)
def test_a_config_that_cannot_be_met_names_the_key(change: dict, message: str):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        from_hugging_face("config.json", LLAMA | change)


def gguf_metadata(**values) -> dict:
    sizes = {
        "block_count": 2, "embedding_length": 32, "feed_forward_length": 48, "context_length": 128,
        "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    return {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in (sizes | values).items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_count": 0}, "llama.block_count is out of range: 0"),
        ({"embedding_length": None}, "llama.embedding_length is missing"),
        ({"attention.head_count": np.array([4, 2])}, "llama.attention.head_count must be of type int"),
        ({"rope.scaling.type": "ntk"}, "rope type 'ntk' is not supported"),
        ({"block_count": np.array([4, 2])}, "llama.block_count must be of type int"),
        ({"attention.sliding_window_pattern": np.array([True])}, "llama.attention.sliding_window_pattern must have 2"),
        ({"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor is supported"),
        ({"rope.scaling.type": "longrope"}, "llama.rope.scaling: short_factor is missing"),
    ],
)
def test_gguf_metadata_that_cannot_be_met_names_the_key_as_the_file_does(values: dict, message: str):
    with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
        from_gguf("x.gguf", gguf_metadata(**values), {"token_embd.weight": (60, 32)}, np.zeros)


@pytest.mark.parametrize("name", ["mamba", ""])
def test_a_gguf_architecture_that_is_not_known_is_named_with_those_that_are(name: str):
    with pytest.raises(ValueError, match=f"x.gguf: architecture '{name}' is not one of .*gemma2.*phi3"):
        from_gguf("x.gguf", {"general.architecture": name}, {}, np.zeros)


@pytest.mark.parametrize("shape", [(2, 2), (2**30,)])
def test_gguf_rope_factors_of_a_wrong_shape_are_not_loaded(shape: tuple[int, ...]):
    shapes = {"token_embd.weight": (60, 32), "rope_freqs.weight": shape}
    with pytest.raises(ValueError, match="tensor rope_freqs.weight has shape"):
        from_gguf("x.gguf", gguf_metadata(), shapes, lambda name: pytest.fail("loaded"))


GEMMA3 = LLAMA | dict(architectures=["Gemma3ForCausalLM"], num_hidden_layers=7, head_dim=16, sliding_window=9)
PHI3 = LLAMA | dict(architectures=["Phi3ForCausalLM"], max_position_embeddings=8192)
FACTORS = dict(short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 4.0, 8.0])
LINEAR = dict(rope_type="linear", factor=8.0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            LLAMA | dict(rope_theta=500.0, rope_scaling=dict(type="linear", factor=8.0)),
            LLAMA | dict(rope_parameters=dict(rope_theta=500.0, **LINEAR)),
        ),
        (
            GEMMA3 | dict(rope_theta=5e5, rope_local_base_freq=500.0, rope_scaling=LINEAR, sliding_window_pattern=6),
            GEMMA3
            | dict(layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"])
            | dict(
                rope_parameters=dict(
                    full_attention=dict(rope_theta=5e5, **LINEAR),
                    sliding_attention=dict(rope_theta=500.0, rope_type="default"),
                )
            ),
        ),
        (
            PHI3 | dict(partial_rotary_factor=0.75, rope_theta=500.0, rope_scaling=dict(type="su", **FACTORS)),
            PHI3
            | dict(
                original_max_position_embeddings=4096,
                rope_parameters=dict(rope_type="longrope", rope_theta=500.0, partial_rotary_factor=0.75, **FACTORS),
            ),
        ),
        (
            LLAMA | dict(architectures=["SmolLM3ForCausalLM"], num_hidden_layers=4),
            LLAMA | dict(architectures=["SmolLM3ForCausalLM"], num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]),
        ),
    ],
    ids=["linear", "gemma3", "phi3", "smollm3"],
)
def test_old_and_new_forms_of_a_config_mean_the_same(old: dict, new: dict):
    assert from_hugging_face("old", old) == from_hugging_face("new", new)


def test_qwen_slides_from_a_layer_on_if_told_to():
    config = LLAMA | dict(architectures=["Qwen2ForCausalLM"], sliding_window=9, max_window_layers=1)
    windows = lambda config: [layer.window for layer in from_hugging_face("config.json", config)[1].layers]
    assert windows(config) == [None, None]
    assert windows(config | {"use_sliding_window": True}) == [None, 9]
