"""MXFP4 experts of a folder: bit for bit what ggml makes of the same blocks; tensors that disagree are refused."""

from __future__ import annotations

import json
import pathlib
import shutil

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from engine.weights.load import load_params, open_checkpoint
from engine.weights.mxfp4 import dequantize

DOWN = "model.layers.1.mlp.experts.down_proj"
TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny" / "gpt-oss"


def random_blocks(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """-> blocks uint8 [*shape, 16] and scales uint8 [*shape], every exponent among them if there are enough."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*shape, 16), np.uint8)
    return blocks, np.resize(np.arange(256, dtype=np.uint8), shape)


def by_ggml(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """-> the values, by the gguf package: its blocks have the low bits of 16 bytes first, then the high ones."""
    bits = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    packed = bits[..., :16] | bits[..., 16:] << 4
    data = np.concatenate([scales[..., None], packed], axis=-1).reshape(-1, 17)
    with np.errstate(over="ignore"):
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.MXFP4)
    return values.reshape(*blocks.shape[:-2], -1)


def test_every_scale_and_every_element_are_those_of_ggml_to_the_bit():
    blocks, scales = random_blocks(64, 8)
    blocks[: 256 // 8, :, :8] = np.arange(256, dtype=np.uint8).reshape(32, 1, 8)
    ours = dequantize(blocks, scales).reshape(64, -1).astype(np.float32)
    np.testing.assert_array_equal(ours + np.float32(0), by_ggml(blocks, scales))  # ggml's zeros have no sign
    np.testing.assert_array_equal(np.signbit(ours[0, :16:2]), [byte & 8 > 0 for byte in range(8)])


def quantized(folder: pathlib.Path, change=lambda tensors: None) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """-> a copy of the tiny GPT-OSS with its experts in MXFP4, and what they are, [experts, in, out]."""
    shutil.copytree(TINY, folder)
    tensors, values = safetensors.numpy.load_file(TINY / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, height, width = tensors.pop(name).shape
        blocks, scales = random_blocks(experts, width, height // 32)
        scales = scales % 8 + 120
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = by_ggml(blocks, scales).transpose(0, 2, 1)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, values


def test_any_run_of_elements_can_be_read(tmp_path: pathlib.Path):
    folder, values = quantized(tmp_path / "model")
    tensor = open_checkpoint(folder).tensors[DOWN]
    whole = values[DOWN].transpose(0, 2, 1)
    assert tensor.shape == whole.shape
    for start, rows, columns in ((0, 1, 7), (31, 1, 2), (33, 3, 40), (4 * 32 * 32 - 5, 1, 5)):
        out = np.empty((rows, columns), tensor.dtype)
        tensor.read(start, out)
        np.testing.assert_array_equal(np.float32(out).ravel(), whole.ravel()[start : start + rows * columns])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_load_as_what_their_blocks_stand_for(tmp_path: pathlib.Path, dtype: str):
    folder, values = quantized(tmp_path / "model")
    params = load_params(open_checkpoint(folder), dtype)
    for i, layer in enumerate(params["layers"]):
        gate_up = values[f"model.layers.{i}.mlp.experts.gate_up_proj"]
        assert layer["experts_gate_up"].dtype == np.dtype(dtype if dtype == "float32" else ml_dtypes.bfloat16)
        for half in range(2):
            np.testing.assert_array_equal(np.float32(layer["experts_gate_up"][:, :, half]), gate_up[:, :, half::2])
        np.testing.assert_array_equal(
            np.float32(layer["experts_down"]), values[f"model.layers.{i}.mlp.experts.down_proj"]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{DOWN}_scales"), "tensors are missing: .*down_proj_scales"),
        (lambda t: t.update({f"{DOWN}_scales": np.zeros((4, 31, 1), np.uint8)}), r"shape \(4, 31, 1\), expected"),
        (
            lambda t: t.update({f"{DOWN}_blocks": np.zeros((4, 32, 1, 8), np.uint8)}),
            r"down_proj_blocks has shape \(4, 32, 1, 8\)",
        ),
        (lambda t: t.update({DOWN: np.zeros((4, 32, 32), np.float32)}), "down_proj is there twice"),
        (
            lambda t: t.update({f"{DOWN}_scales": np.zeros((4, 32, 1), np.int8)}),
            "_scales must be of uint8, is of int8",
        ),
    ],
)
def test_blocks_and_scales_that_disagree_are_named(tmp_path: pathlib.Path, change, message: str):
    folder, _ = quantized(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        load_params(open_checkpoint(folder), "float32")
