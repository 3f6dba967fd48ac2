"""Streaming of tensors: every layout and dtype arrives with the values that numpy would give, in blocks and threads."""

from __future__ import annotations

import pathlib

import ml_dtypes
import numpy as np
import pytest

from engine.weights.gguf_blocks import BLOCK_TYPES, dequantize
from engine.weights.place import Placement
from engine.weights.stored import BlockTensor, OpenFile, PlainTensor, StoredTensor, read_all
from engine.weights.stream import MAX_COLUMNS, Streamer

HEADER = 17  # bytes before the tensor: its elements are not aligned


def store(folder: pathlib.Path, array: np.ndarray) -> PlainTensor:
    path = folder / "tensor"
    path.write_bytes(b"x" * HEADER + array.tobytes())
    return PlainTensor(OpenFile(path), HEADER, array.dtype, array.shape)


def stream(tensor: StoredTensor, out: np.ndarray, ranges: tuple | None = None) -> np.ndarray:
    view = tensor.shape
    with Streamer(threads=3) as streamer:
        streamer.fill([(tensor, Placement(0, view, ranges or tuple((0, n) for n in view), out))])
    return out


SHAPES = [(1,), (3, 5), (300, 700), (2 * MAX_COLUMNS + 5,), (70, MAX_COLUMNS + 3), (1, 90, 33), (6, 7, 8, 9), (1000, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_all_of_a_tensor_arrives_as_it_is_and_transposed(tmp_path, shape, transposed):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    out = np.full(shape[::-1], np.nan, np.float32).T if transposed else np.full(shape, np.nan, np.float32)
    np.testing.assert_array_equal(stream(store(tmp_path, array), out), array)


@pytest.mark.parametrize(
    "ranges", [((10, 200), (0, 500)), ((0, 300), (100, 101)), ((3, 4), (7, 499)), ((5, 5), (0, 9))]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_window_arrives_without_what_is_around_it(tmp_path, ranges, transposed):
    array = np.random.default_rng(0).standard_normal((300, 500)).astype(np.float32)
    expected = array[tuple(slice(*span) for span in ranges)]
    out = np.full(expected.shape[::-1], np.nan, np.float32).T if transposed else np.full(expected.shape, np.nan)
    out = out.astype(np.float32)
    np.testing.assert_array_equal(stream(store(tmp_path, array), out, ranges), expected)


@pytest.mark.parametrize("target", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_every_dtype_becomes_the_engines(tmp_path, source, target):
    array = np.random.default_rng(0).standard_normal((130, 257)).astype(np.float32).astype(source)
    out = np.zeros((257, 130), target).T
    np.testing.assert_array_equal(stream(store(tmp_path, array), out), array.astype(target))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16"])
def test_parts_of_blocks_are_dequantized_like_the_whole(tmp_path, name):
    block, columns = BLOCK_TYPES[name], 768
    blocks = np.random.default_rng(0).integers(0, 60, 20 * columns // block.size * block.layout.itemsize, np.uint8)
    whole = dequantize(blocks, name).reshape(20, columns)
    (tmp_path / "tensor").write_bytes(b"x" * HEADER + blocks.tobytes())
    tensor = BlockTensor(OpenFile(tmp_path / "tensor"), HEADER, block, whole.shape)
    np.testing.assert_array_equal(read_all(tensor), whole)
    ranges = ((3, 19), (33, 700))
    np.testing.assert_array_equal(stream(tensor, np.zeros((16, 667), np.float32), ranges), whole[3:19, 33:700])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_an_offset_is_added_in_float32(tmp_path, dtype):
    array = np.random.default_rng(0).standard_normal(500).astype(ml_dtypes.bfloat16)
    out = np.zeros(500, dtype)
    with Streamer() as streamer:
        streamer.fill([(store(tmp_path, array), Placement(0, (500,), ((0, 500),), out, offset=1.0))])
    np.testing.assert_array_equal(out, (array.astype(np.float32) + 1).astype(dtype))


def test_more_pieces_than_one_system_call_takes_are_read(tmp_path):
    data = np.arange(9000, dtype=np.uint16)
    (tmp_path / "data").write_bytes(data.tobytes())
    out = np.zeros((3000, 3), np.uint16)
    OpenFile(tmp_path / "data").read(0, [row.view(np.uint8).data for row in out])
    np.testing.assert_array_equal(out.reshape(-1), data)


def test_an_error_in_a_thread_reaches_the_caller(tmp_path):
    tensor = store(tmp_path, np.zeros((3000, 3000), np.float32))
    (tmp_path / "tensor").write_bytes(b"short")
    with pytest.raises(ValueError, match="tensor: ends at byte"):
        stream(tensor, np.zeros((3000, 3000), np.float32))
