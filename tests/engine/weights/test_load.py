"""The same weights as a Hugging Face folder and as a GGUF file become the same parameters; broken ones are refused."""

from __future__ import annotations

import json
import pathlib

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from engine.weights.load import load_params, open_checkpoint
from engine.weights.names import GGUF, HF, TENSORS

CONFIG = dict(
    architectures=["Qwen2ForCausalLM"],
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
    max_position_embeddings=128,
    rms_norm_eps=2**-17,
    rope_theta=5000.0,
)
LLAMA = CONFIG | {"architectures": ["LlamaForCausalLM"]}
K, G, H, D = 2, 2, 8, 32


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """-> random tensors under Hugging Face names."""
    rng = np.random.default_rng(seed)
    F, V = config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        layer = dict(
            attn_norm=(D,), q=(K * G * H, D), k=(K * H, D), v=(K * H, D), out=(D, K * G * H), mlp_norm=(D,),
            gate=(F, D), up=(F, D), down=(D, F),
        )  # fmt: skip
        if config["architectures"] == ["Qwen2ForCausalLM"]:
            layer |= dict(q_bias=(K * G * H,), k_bias=(K * H,), v_bias=(K * H,))
        shapes |= {TENSORS[part][HF].format(i): shape for part, shape in layer.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def save_folder(folder: pathlib.Path, config: dict, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def save_gguf(path: pathlib.Path, architecture: str, config: dict, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """Write what llama.cpp would: its names, and for the llama family q and k with rope pairs side by side."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(K * G)
    writer.add_head_count_kv(K)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names["lm_head.weight"] = "output.weight"
    for pair in TENSORS.values():
        names |= {pair[HF].format(i, 0): pair[GGUF].format(i) for i in range(config["num_hidden_layers"])}
    for name, tensor in tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = tensor.reshape(-1, 2, H // 2, D).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names[name], tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: pathlib.Path, dtype: str = "float32"):
    return load_params(open_checkpoint(path), dtype)


@pytest.mark.parametrize(("config", "architecture"), [(CONFIG, "qwen2"), (LLAMA, "llama")])
def test_folder_and_gguf_give_the_same_config_and_parameters(tmp_path: pathlib.Path, config: dict, architecture: str):
    tensors = weights(config)
    folder = save_folder(tmp_path / "folder", config, tensors)
    file = save_gguf(tmp_path / "model.gguf", architecture, config, tensors)
    assert open_checkpoint(folder).config == open_checkpoint(file).config
    a, b = load(folder), load(file)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    layer = a["layers"][1]
    q = tensors["model.layers.1.self_attn.q_proj.weight"].reshape(K, G, H, D)
    np.testing.assert_array_equal(layer["qkv"][:, 1, 0], q[1, 0].T)
    np.testing.assert_array_equal(layer["qkv"][:, 1, G + 1], tensors["model.layers.1.self_attn.v_proj.weight"][H:].T)


def test_bf16_shards_load_as_they_are(tmp_path: pathlib.Path):
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in weights(LLAMA).items()}
    folder = save_folder(tmp_path / "folder", LLAMA, tensors)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for shard, members in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in members}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    params = load(folder, "bfloat16")
    assert params["embed"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "tensors are missing: model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"extra.weight": t["model.norm.weight"]}),
            "tensors are not part of the model: extra.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
            r"model.norm.weight has shape \(31,\), expected \(32,\)",
        ),
    ],
)
def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: pathlib.Path, change, message: str):
    tensors = weights(LLAMA)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load(save_folder(tmp_path / "folder", LLAMA, tensors))


def test_a_path_that_holds_no_model_says_so(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="neither a .gguf file nor a folder with config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{" * 5000)
    with pytest.raises(ValueError, match="not valid JSON"):
        open_checkpoint(tmp_path)
