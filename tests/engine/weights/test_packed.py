"""Weights that stay in few bits: loaded, they stand for the very numbers that expanding them at loading gives."""

from __future__ import annotations

import pathlib

import gguf
import jax
import numpy as np
import pytest

from engine.models.config import LayerSpec
from engine.models.narrow import ONLINE, plan_of_few
from engine.models.narrow_placement import abstract_narrow, random_narrow
from engine.models.params import map_specs, num_bytes, param_specs
from engine.models.placement import whole
from engine.models.relay import random_params
from engine.weights.gguf_blocks import BLOCK_TYPES
from engine.weights.gguf_packed import TYPES
from engine.weights.load import load_params, open_checkpoint, quantization_of
from engine.weights.quantization import choose_quantization
from kernels.quantized import Joined, QuantizedTensor, dequantize

D, F, V, HEADS, KV_HEADS = 256, 512, 64, 4, 2
SHAPES = {
    "token_embd": (V, D), "output": (V, D), "blk.0.attn_q": (D, D), "blk.0.attn_k": (D // 2, D),
    "blk.0.attn_v": (D // 2, D), "blk.0.attn_output": (D, D), "blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D),
    "blk.0.ffn_down": (D, F),
}  # fmt: skip
NORMS = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """-> the bytes of a tensor of random blocks whose scales are small numbers: uint8 [*, out, bytes]."""
    draw, block = np.random.default_rng(seed), BLOCK_TYPES[kind]
    count = np.prod(shape) // block.size
    blocks = draw.integers(0, 256, (count, block.layout.itemsize), np.uint8).view(block.layout)[:, 0]
    for name in ("d", "m", "dmin"):
        if name in block.layout.names:
            blocks[name] = draw.uniform(0.001, 0.01, count)
    if "exponent" in block.layout.names:
        blocks["exponent"] = draw.integers(115, 125, count)
    return blocks.view(np.uint8).reshape(*shape[:-1], -1)


def save(path: pathlib.Path, kinds: dict[str, str], default: str) -> pathlib.Path:
    """Write a Llama of one layer; `kinds`: types of single tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    for name in NORMS:
        writer.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    for seed, (name, shape) in enumerate(SHAPES.items()):
        kind = kinds.get(name, default)
        if kind == "F32":
            values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
            writer.add_tensor(f"{name}.weight", values)
        else:
            raw = random_blocks(kind, shape, seed)
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_the_model_sees(name: str, weight: object, shape: tuple[int, ...]) -> np.ndarray:
    """-> a parameter in float32 with its inputs first, as plain ones are."""
    if isinstance(weight, Joined):
        axis = weight.axis + 1
        parts = [np.asarray(as_the_model_sees(name, piece, ())) for piece in weight.pieces]
        return np.concatenate(parts, axis=axis)
    if not isinstance(weight, QuantizedTensor):
        return np.asarray(weight)
    wide = np.asarray(dequantize(weight, "float32"))
    if name in ("embed", "lm_head"):
        return wide
    wide = np.moveaxis(wide, -1, 0)
    return wide.reshape(shape) if shape else wide


def check_same(path: pathlib.Path, platform: str) -> dict:
    """Compare what is kept with what expanding gives. -> the parameters that are kept."""
    checkpoint = open_checkpoint(path)
    quantization = quantization_of(checkpoint, "gguf", platform, "float32")
    kept = load_params(checkpoint, "float32", quantization=quantization)
    wide = load_params(checkpoint, "float32")
    abstract = abstract_narrow(whole(checkpoint.config), "float32", quantization.plan)
    like = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert like(kept) == like(abstract)

    def compare(path, spec):
        mine, theirs = kept, wide
        for key in path:
            mine, theirs = mine[key], theirs[key]
        seen = as_the_model_sees(path[-1], mine, spec.shape)
        np.testing.assert_allclose(seen, theirs, rtol=1e-6, atol=1e-7 * np.abs(theirs).max(), err_msg=str(path))

    map_specs(compare, param_specs(checkpoint.config))
    return kept


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", TYPES)
def test_a_gguf_type_kept_packed_stands_for_its_dequantized_self(tmp_path: pathlib.Path, kind: str, platform: str):
    kept = check_same(save(tmp_path / "model.gguf", {}, kind), platform)
    file_bytes = sum(np.prod(shape) for shape in SHAPES.values()) * BLOCK_TYPES[kind].layout.itemsize
    assert num_bytes(kept) <= file_bytes / BLOCK_TYPES[kind].size * 1.04 + 3 * 4 * D  # Q4_K's 6-bit scales take 8


def test_parts_of_a_fused_weight_may_be_of_different_types(tmp_path: pathlib.Path):
    kinds = {"blk.0.attn_v": "Q6_K", "blk.0.ffn_up": "F32", "blk.0.ffn_down": "Q5_K", "output": "Q8_0"}
    kept = check_same(save(tmp_path / "model.gguf", kinds, "Q4_K"), "gpu")
    layer = kept["layers"][0]
    assert [piece.layout.format for piece in layer["qkv"].pieces] == ["q4_k", "q4_k", "q6_k"]
    assert isinstance(layer["gate_up"].pieces[1], jax.Array)  # F32
    assert isinstance(layer["down"], jax.Array)  # Q5_K has no packed form here


@pytest.mark.parametrize("method", ONLINE)
def test_random_and_loaded_weights_are_quantized_alike(tmp_path: pathlib.Path, method: str):
    checkpoint = open_checkpoint(save(tmp_path / "model.gguf", {}, "F32"))
    quantization = quantization_of(checkpoint, method, "cpu", "float32")
    loaded = load_params(checkpoint, "float32", quantization=quantization)
    drawn = random_narrow(checkpoint.config, "float32", 0, whole(checkpoint.config), quantization.plan)
    assert jax.tree.structure(loaded) == jax.tree.structure(drawn)
    assert isinstance(loaded["layers"][0]["qkv"], QuantizedTensor)
    assert isinstance(loaded["embed"], jax.Array)
    wide = load_params(checkpoint, "float32")["layers"][0]
    for name in ("qkv", "out", "gate_up", "down"):
        seen = as_the_model_sees(name, loaded["layers"][0][name], wide[name].shape)
        bound = np.abs(wide[name]).max() * (0.15 if method == "int4" else 0.07)
        assert np.abs(seen - wide[name]).max() <= bound
    random = random_params(checkpoint.config, "float32", 0, whole(checkpoint.config))["layers"][0]["down"]
    seen = as_the_model_sees("down", drawn["layers"][0]["down"], random.shape)
    assert np.abs(seen - random).max() <= np.abs(random).max() * 0.15


@pytest.mark.parametrize(
    ("setting", "method", "platform", "name", "online"),
    [
        (None, None, "gpu", "none", False),
        (None, "gguf", "gpu", "gguf", False),
        (None, "gguf", "cpu", "dequantize", False),
        ("gguf", "gguf", "cpu", "gguf", False),
        ("dequantize", "gguf", "gpu", "dequantize", False),
        ("fp8", None, "gpu", "fp8", True),
        ("fp8", "fp8", "gpu", "fp8", False),
        ("int8", "gguf", "cpu", "int8", True),
    ],
)
def test_the_setting_and_the_checkpoint_decide_together(setting, method, platform, name, online):
    chosen = choose_quantization(setting, method, (), {}, open_tiny(), platform, "float32")
    assert (chosen.name, chosen.online) == (name, online)


@pytest.mark.parametrize(("setting", "method"), [("awq", None), ("gptq", "gguf")])
def test_a_setting_that_the_checkpoint_is_not_is_refused(setting, method):
    with pytest.raises(ValueError, match=f"quantization: '{setting}' is not possible"):
        choose_quantization(setting, method, (), {}, open_tiny(), "gpu", "float32")


def open_tiny():
    return open_checkpoint(pathlib.Path(__file__).parents[2] / "data" / "tiny" / "llama3").config


def test_a_few_layers_are_stored_as_those_that_they_stand_for():
    dense, sparse = LayerSpec(None), LayerSpec(None, window=4)
    plan = {("embed",): 1, **{("layers", i, "down"): 10 + i for i in range(4)}}
    few = plan_of_few(plan, (dense, dense, sparse, sparse), (dense, sparse, dense, sparse))  # pyright: ignore
    assert few == {("embed",): 1, **{("layers", i, "down"): [10, 12][i % 2] for i in range(4)}}
