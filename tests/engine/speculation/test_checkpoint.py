"""Heads from their published layouts: which tensor becomes which parameter, and what is refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.models.config import LayerSpec, ModelConfig, RopeSpec
from engine.speculation.checkpoint import abstract_draft, open_draft
from engine.speculative_config import SpeculativeConfig
from engine.weights.load import open_checkpoint

D, HEADS, KV, H, F, VOCAB, DRAFT_VOCAB = 16, 4, 2, 4, 24, 60, 20
TARGET = ModelConfig("llama", VOCAB, D, F, HEADS, KV, H, 64, (LayerSpec(RopeSpec(H)),) * 6)
CONFIG = dict(
    architectures=["LlamaForCausalLMEagle3"], hidden_size=D, intermediate_size=F, num_hidden_layers=1,
    num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=H, vocab_size=VOCAB, draft_vocab_size=DRAFT_VOCAB,
    max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
TINY_DEEPSEEK = pathlib.Path(__file__).parents[2] / "data" / "tiny" / "deepseek-v3"


def eagle3_tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {
        "fc.weight": (D, 3 * D), "norm.weight": (D,), "lm_head.weight": (DRAFT_VOCAB, D),
        "midlayer.hidden_norm.weight": (D,), "midlayer.input_layernorm.weight": (D,),
        "midlayer.post_attention_layernorm.weight": (D,), "midlayer.self_attn.q_proj.weight": (HEADS * H, 2 * D),
        "midlayer.self_attn.k_proj.weight": (KV * H, 2 * D), "midlayer.self_attn.v_proj.weight": (KV * H, 2 * D),
        "midlayer.self_attn.o_proj.weight": (D, HEADS * H), "midlayer.mlp.gate_proj.weight": (F, D),
        "midlayer.mlp.up_proj.weight": (F, D), "midlayer.mlp.down_proj.weight": (D, F),
    }  # fmt: skip
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    ids = np.sort(draw.choice(VOCAB, DRAFT_VOCAB, replace=False))
    return tensors | {"d2t": ids - np.arange(DRAFT_VOCAB), "t2d": np.isin(np.arange(VOCAB), ids)}


def open_eagle3(folder: pathlib.Path, tensors: dict[str, np.ndarray], **changes: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, folder / "model.safetensors")
    return open_draft(SpeculativeConfig("eagle3", 3, model=str(folder)), TARGET, None, dummy=False, kv_dtype="float32")


def check_shapes(draft: Any, params: dict[str, Any]) -> None:
    import jax

    shape = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
    assert shape(params) == shape(abstract_draft(draft.drafter, "float32"))


def test_an_eagle3_folder_becomes_a_head(tmp_path: pathlib.Path):
    tensors = eagle3_tensors()
    draft = open_eagle3(tmp_path, tensors)
    params = draft.load("float32", 0)
    check_shapes(draft, params)
    assert draft.drafter.taps == (2, 3, 3)  # low, middle and high of six layers
    np.testing.assert_array_equal(params["fc"], tensors["fc.weight"].T)
    np.testing.assert_array_equal(params["embed"], tensors["lm_head.weight"])
    np.testing.assert_array_equal(params["hidden_norm"], tensors["midlayer.hidden_norm.weight"])
    np.testing.assert_array_equal(params["layers"][0]["attn_norm"], tensors["midlayer.input_layernorm.weight"])
    np.testing.assert_array_equal(np.where(tensors["t2d"])[0], params["draft_ids"])
    keys = tensors["midlayer.self_attn.k_proj.weight"].reshape(KV, H, 2 * D)
    np.testing.assert_array_equal(params["layers"][0]["qkv"][:, :, -2], keys.transpose(2, 0, 1))


def test_layers_and_residual_are_the_config_s_choice(tmp_path: pathlib.Path):
    eagle = {"eagle_aux_hidden_state_layer_ids": [1, 4, 6]}
    draft = open_eagle3(tmp_path, eagle3_tensors(), eagle_config=eagle, norm_before_residual=True)
    assert draft.drafter.taps == (1, 4, 6) and draft.drafter.norm_before_residual


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=8), "must be one layer of hidden_size 16"),
        (dict(num_hidden_layers=2), "must be one layer"),
        (dict(draft_vocab_size=VOCAB + 1), "draft_vocab_size 61 is more than the model's vocabulary, 60"),
        (dict(architectures=["GPT2"]), "architectures must name one of LlamaForCausalLMEagle3"),
        (dict(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 7]}), "are not all in a model of 6 layers"),
    ],
)
def test_a_head_for_another_model_is_refused(tmp_path: pathlib.Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        open_eagle3(tmp_path, eagle3_tensors(), **changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc.weight", None, "fc.weight is missing"),
        ("fc.weight", np.zeros((D, 2 * D), np.float32), "fc.weight has shape"),
        ("d2t", np.full(DRAFT_VOCAB, VOCAB), "d2t names tokens outside the vocabulary"),
        ("midlayer.mlp.up_proj.weight", None, "missing: model.layers.0.mlp.up_proj.weight"),
        ("midlayer.more.weight", np.zeros(3, np.float32), "not part of the model: model.layers.0.more.weight"),
    ],
)
def test_a_damaged_head_is_refused_by_the_name_of_its_tensor(tmp_path: pathlib.Path, name: str, value, message: str):
    tensors = eagle3_tensors() | {name: value}
    with pytest.raises(ValueError, match=message):
        open_eagle3(tmp_path, {k: v for k, v in tensors.items() if v is not None}).load("float32", 0)


def test_the_layer_behind_the_last_becomes_an_mtp_head(tmp_path: pathlib.Path):
    config = json.loads((TINY_DEEPSEEK / "config.json").read_text())
    tensors, depth = load_file(TINY_DEEPSEEK / "model.safetensors"), config["num_hidden_layers"]
    last = {k: v for k, v in tensors.items() if k.startswith(f"model.layers.{depth - 1}.")}
    mtp = {k.replace(f"layers.{depth - 1}.", f"layers.{depth}."): v for k, v in last.items()}
    width, prefix = config["hidden_size"], f"model.layers.{depth}."
    draw = np.random.default_rng(0)
    mtp[f"{prefix}eh_proj.weight"] = draw.normal(size=(width, 2 * width)).astype(np.float32)
    for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
        mtp[prefix + name] = draw.normal(size=width).astype(np.float32)
    mtp[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"] + 1
    mtp[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors | mtp, tmp_path / "model.safetensors")

    checkpoint = open_checkpoint(tmp_path)
    draft = open_draft(SpeculativeConfig("mtp", 2), checkpoint.config, checkpoint, dummy=False, kv_dtype="float32")
    assert draft.load is not None
    params = draft.load("float32", 0)
    check_shapes(draft, params)
    np.testing.assert_array_equal(params["eh_proj"], mtp[f"{prefix}eh_proj.weight"].T)
    np.testing.assert_array_equal(params["final_norm"], mtp[f"{prefix}shared_head.norm.weight"])
    np.testing.assert_allclose(params["embed"], tensors["lm_head.weight"] + 1)
    with pytest.raises(ValueError, match="method 'mtp' needs another checkpoint"):
        checkpoint = open_checkpoint(TINY_DEEPSEEK)
        open_draft(SpeculativeConfig("mtp", 2), checkpoint.config, checkpoint, dummy=False, kv_dtype="float32")
