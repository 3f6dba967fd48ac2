"""A tiny model's config and tensors must agree, and any of its dtypes runs under strict promotion."""

from __future__ import annotations

import json
import pathlib
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from engine.models.params import map_specs, param_specs
from engine.models.transformer import attention_spec, forward, logits
from engine.weights.load import load_params, open_checkpoint
from kernels.attention import BACKENDS, RaggedBatch

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny"
FOLDERS = sorted(path.parent for path in TINY.glob("*/config.json"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("olmo2", {"num_hidden_layers": 4}, "tensors are missing: model.layers.3.mlp.down_proj.weight, .* and 6 more"),
        ("olmo2", {"num_hidden_layers": 2}, "tensors are not part of the model: model.layers.2.mlp.down_proj.weight"),
        ("olmo2", {"num_key_value_heads": 4}, r"k_norm.weight has shape \(16,\), expected \(32,\)|k_proj.weight has"),
        ("olmo2", {"intermediate_size": 50}, r"mlp.down_proj.weight has shape \(32, 48\), expected \(32, 50\)"),
        ("olmo2", {"vocab_size": 161}, r"model.embed_tokens.weight has shape \(160, 32\), expected \(161, 32\)"),
        ("olmo2", {"attention_bias": True}, "tensors are missing: model.layers.0.self_attn.k_proj.bias"),
        ("qwen3", {"head_dim": 8}, r"has shape \(16,\), expected \(8,\)|has shape \(64, 32\), expected \(32, 32\)"),
        ("gemma2", {"tie_word_embeddings": False}, "tensors are missing: lm_head.weight"),
        ("llama-biased", {"mlp_bias": False}, "tensors are not part of the model: model.layers.0.mlp.down_proj.bias"),
        ("phi3", {"num_key_value_heads": 4}, r"qkv_proj.weight has shape \(64, 32\), expected \(96, 32\)"),
        ("gemma3", {"architectures": ["Gemma2ForCausalLM"]}, "not part of the model: model.layers.0.self_attn.k_norm"),
    ],
)
def test_a_config_that_contradicts_its_tensors_names_them(
    tmp_path: pathlib.Path, name: str, change: dict, message: str
):
    folder = tmp_path / name
    shutil.copytree(TINY / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_params(open_checkpoint(folder), "float32")


def with_predictor(folder: pathlib.Path, **changes: int) -> pathlib.Path:
    """-> a copy of the tiny DeepSeek-V3 with a fourth layer, which predicts the token after the next one."""
    shutil.copytree(TINY / "deepseek-v3", folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in ("eh_proj.weight", "enorm.weight", "shared_head.norm.weight", "mlp.gate.weight"):
        tensors[f"model.layers.3.{name}"] = np.zeros((2, 3), np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_layer_that_predicts_further_tokens_is_left_alone(tmp_path: pathlib.Path):
    params = load_params(open_checkpoint(with_predictor(tmp_path / "model")), "float32")
    assert len(params["layers"]) == 3
    missed = open_checkpoint(with_predictor(tmp_path / "other", num_hidden_layers=2))
    with pytest.raises(ValueError, match="not part of the model: model.layers.2.input_layernorm.weight"):
        load_params(missed, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_activations_keep_the_models_dtype_and_logits_are_float32(folder: pathlib.Path, dtype: str):
    config = open_checkpoint(folder).config
    of = jax.ShapeDtypeStruct
    params = map_specs(lambda path, spec: of(spec.shape, spec.dtype or dtype), param_specs(config))
    backend = BACKENDS["xla"]
    caches = [backend.cache_spec(attention_spec(config, i), 9, 16, dtype) for i in range(len(config.layers))]
    shapes = dict(page_table=(2, 4), kv_lens=(2,), cu_q_lens=(3,), num_rows=(), num_decodes=())
    shapes |= dict(write_page=(8,), write_offset=(8,))
    batch = RaggedBatch(**{name: of(shape, "int32") for name, shape in shapes.items()})
    tokens = of((8,), "int32")
    hidden, new_caches = jax.eval_shape(partial(forward, config, backend), params, caches, tokens, tokens, batch)
    assert hidden.dtype == dtype
    assert new_caches == caches
    assert jax.eval_shape(partial(logits, config), params, hidden).dtype == jnp.float32
