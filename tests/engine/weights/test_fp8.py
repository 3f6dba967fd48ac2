"""FP8 weights with a scale for each square: what they stand for, in any run of elements; refused if they disagree."""

from __future__ import annotations

import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from engine.weights.fp8 import ScaledTensor, with_scales
from engine.weights.load import load_params, open_checkpoint

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny" / "deepseek-v3"
NAME = "model.layers.0.mlp.up_proj.weight"  # [48, 32]
E4M3 = ml_dtypes.float8_e4m3fn


class Array:
    """A StoredTensor in memory."""

    def __init__(self, values: np.ndarray):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def read(self, start: int, out: np.ndarray) -> None:
        out[...] = self.values.reshape(-1)[start : start + out.size].reshape(out.shape)


def test_any_run_of_elements_is_multiplied_by_its_squares_scales():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((300, 200)).astype(E4M3)
    scales = rng.random((3, 2), np.float32)
    tensors = with_scales("x", {"a.weight": Array(weight), "a.weight_scale_inv": Array(scales)})
    tensor = tensors["a.weight"]
    assert list(tensors) == ["a.weight"]
    assert (tensor.shape, tensor.dtype) == ((300, 200), np.float32)
    expected = weight.astype(np.float32) * scales.repeat(128, 0)[:300].repeat(128, 1)[:, :200]
    for start, rows, columns in (
        (0, 300, 200),
        (0, 1, 1),
        (127 * 200, 2, 200),
        (130 * 200 + 100, 5, 77),
        (59999, 1, 1),
    ):
        out = np.empty((rows, columns), np.float32)
        tensor.read(start, out)
        np.testing.assert_array_equal(out.ravel(), expected.ravel()[start : start + out.size])


def with_fp8(folder: pathlib.Path, **changes: np.ndarray | None) -> pathlib.Path:
    """-> a copy of the tiny DeepSeek-V3 with one weight in FP8; changes: "weight" and "scales" if they are others."""
    shutil.copytree(TINY, folder)
    tensors = safetensors.numpy.load_file(TINY / "model.safetensors")
    made = {"weight": (tensors[NAME] / 2).astype(E4M3), "scales": np.full((1, 1), 2, np.float32)} | changes
    tensors |= {NAME: made["weight"], f"{NAME}_scale_inv": made["scales"]}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_folder_with_fp8_weights_loads_as_what_they_stand_for(tmp_path: pathlib.Path, scale_dtype: type):
    folder = with_fp8(tmp_path / "model", scales=np.full((1, 1), 2, scale_dtype))
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint.tensors[NAME], ScaledTensor)
    params, plain = load_params(checkpoint, "float32"), load_params(open_checkpoint(TINY), "float32")
    up = np.asarray(plain["layers"][0]["gate_up"])[:, 1]
    expected = (up / 2).astype(E4M3).astype(np.float32) * 2
    np.testing.assert_array_equal(params["layers"][0]["gate_up"][:, 1], expected)
    np.testing.assert_array_equal(params["layers"][1]["kv_a"], plain["layers"][1]["kv_a"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": np.ones((1, 2), np.float32)}, r"up_proj.weight_scale_inv has shape \(1, 2\), expected \(1, 1\)"),
        ({"scales": np.ones((1, 1), np.float16)}, "scale_inv must be of float32 or bfloat16, is of float16"),
        ({"weight": np.ones((48, 32), np.float32)}, "up_proj.weight has scales, but is of float32"),
        ({"weight": None}, "tensors are missing: model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_weights_and_scales_that_disagree_are_named(tmp_path: pathlib.Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(with_fp8(tmp_path / "model", **changes))
