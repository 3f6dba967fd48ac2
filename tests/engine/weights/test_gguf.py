"""The GGUF reader on good files: metadata, shapes and views, and dequantization equal to ggml's own, bit for bit."""

from __future__ import annotations

import pathlib
import struct
import time

import gguf
import numpy as np
import pytest

from engine.weights.gguf import open_gguf
from engine.weights.gguf_blocks import BLOCK_TYPES, dequantize

# Signed zeros, the smallest subnormal, the largest subnormal, one, the largest finite, infinity.
ODD_HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x3C00, 0xFBFF, 0x7C00]


@pytest.fixture
def small_file(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file with a value of each kind and three tensors, written by ggml's own library."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e300)
    writer.add_bool("yes", True)
    writer.add_string("text", "Grüße, 世界 🌍")
    writer.add_array("texts", ["", "a", "ß" * 1000])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.25, -1e30])
    writer.add_array("bools", [True, False])
    writer.add_tensor("matrix", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("half", np.array([1.5, -0.0, 65504], np.float16))
    quants = np.arange(2 * 3 * 34, dtype=np.uint8).reshape(2, 3, 34)
    writer.add_tensor("cube", quants, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(type_name: str, rows: int, rng: np.random.Generator) -> np.ndarray:
    """-> whole blocks of random bytes, some of whose scales are odd ones. uint8 [rows, bytes]"""
    block = BLOCK_TYPES[type_name]
    data = rng.integers(0, 256, (rows, 4 * block.layout.itemsize), np.uint8)
    for field in {"d", "m", "dmin"} & set(block.layout.names or ()):
        halves = data.view(block.layout)[field]
        halves[: rows // 2] = rng.choice(np.array(ODD_HALVES, np.uint16), halves[: rows // 2].shape).view(np.float16)
    return data


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal to the bit, NaNs excepted: their payload is the processor's choice."""
    assert ours.dtype == theirs.dtype == np.float32
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    known = ~np.isnan(theirs)
    assert np.array_equal(ours.view(np.uint32)[known], theirs.view(np.uint32)[known])


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_dequantization_is_bit_equal_to_ggml(type_name: str):
    data = random_blocks(type_name, 700, np.random.default_rng(0))  # more than a chunk of most types
    with np.errstate(all="ignore"):  # scales of infinity times zero
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name])
        ours = dequantize(data.reshape(-1), type_name)
    assert_same_bits(ours, theirs.reshape(-1))


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_block_sizes_are_ggmls(type_name: str):
    block = BLOCK_TYPES[type_name]
    assert (block.size, block.layout.itemsize) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]


def test_chunks_meet_without_a_gap():
    data = np.random.default_rng(1).integers(0, 256, 34 * 5000, np.uint8)
    data.reshape(-1, 34)[:, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    expected = data.reshape(-1, 34)[:, 2:].view(np.int8).astype(np.float32) * 0.5
    assert np.array_equal(dequantize(data, "Q8_0"), expected.reshape(-1))


def test_metadata_of_every_kind_is_read(small_file: pathlib.Path):
    metadata = open_gguf(small_file).metadata
    scalars = {key: value for key, value in metadata.items() if not isinstance(value, np.ndarray)}
    assert scalars == {
        "general.architecture": "llama",
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -32768,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f32": 0.5,
        "f64": 1e300,
        "yes": True,
        "text": "Grüße, 世界 🌍",
        "texts": ["", "a", "ß" * 1000],
    }
    assert metadata["yes"] is True
    assert metadata["ints"].tolist() == [1, -2, 3]
    assert metadata["floats"].tolist() == [0.25, np.float32(-1e30)]
    assert metadata["bools"].tolist() == [True, False]


def test_tensors_have_numpy_shapes_and_load_as_float32(small_file: pathlib.Path):
    with open_gguf(small_file) as file:
        assert {name: (info.type, info.shape) for name, info in file.tensors.items()} == {
            "matrix": ("F32", (2, 3)),
            "half": ("F16", (3,)),
            "cube": ("Q8_0", (2, 3, 32)),
        }
        assert np.array_equal(file.load("matrix"), np.arange(6, dtype=np.float32).reshape(2, 3))
        half = file.load("half")
        assert half.dtype == np.float32
        assert half.tolist() == [1.5, 0.0, 65504.0]
        assert np.signbit(half[1])
        assert file.load("cube").shape == (2, 3, 32)
        assert np.array_equal(file.raw("cube"), np.arange(2 * 3 * 34, dtype=np.uint8))


def test_raw_is_a_read_only_view_that_outlives_the_file(small_file: pathlib.Path):
    with open_gguf(small_file) as file:
        raw = file.raw("matrix")
    assert not raw.flags.owndata
    assert not raw.flags.writeable
    assert np.array_equal(raw.view(np.float32), np.arange(6, dtype=np.float32))


def test_a_loaded_tensor_is_the_callers_own(small_file: pathlib.Path):
    file = open_gguf(small_file)
    file.load("matrix")[...] = -1
    assert file.load("matrix").max() == 5


def test_a_closed_file_and_an_unknown_tensor_are_named(small_file: pathlib.Path):
    file = open_gguf(small_file)
    with pytest.raises(ValueError, match="small.gguf.*no tensor 'absent'"):
        file.raw("absent")
    file.close()
    with pytest.raises(ValueError, match="small.gguf: matrix: the file is closed"):
        file.load("matrix")


def test_version_2_is_read(small_file: pathlib.Path):
    data = bytearray(small_file.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    small_file.write_bytes(data)
    assert open_gguf(small_file).metadata["u8"] == 255


def test_the_alignment_of_the_file_is_honoured(tmp_path: pathlib.Path):
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a", np.ones(3, np.float32))
    writer.add_tensor("b", np.full(5, 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert [info.offset % 256 for info in file.tensors.values()] == [0, 0]
    assert file.load("b").tolist() == [2, 2, 2, 2, 2]


def test_smollm2_matches_ggmls_reader(smollm2_gguf: pathlib.Path):
    theirs = gguf.GGUFReader(smollm2_gguf)
    with open_gguf(smollm2_gguf) as file:
        assert [t.name for t in theirs.tensors] == list(file.tensors)
        by_name = {t.name: t for t in theirs.tensors}
        for name in ("token_embd.weight", "blk.7.attn_norm.weight", "blk.29.ffn_down.weight"):
            tensor = by_name[name]
            assert file.tensors[name].type == tensor.tensor_type.name
            assert file.tensors[name].offset == tensor.data_offset
            reference = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert_same_bits(file.load(name), reference)
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "general.name"):
            field = theirs.get_field(key)
            assert field is not None
            assert list(file.metadata[key]) == list(field.contents())


def test_smollm2_opens_and_dequantizes_in_under_three_seconds(smollm2_gguf: pathlib.Path):
    start = time.process_time()  # not the clock's: the machine may be busy with other tests
    with open_gguf(smollm2_gguf) as file:
        elements = sum(file.load(name).size for name in file.tensors)
    seconds = time.process_time() - start
    assert elements == 134_515_008
    assert seconds < 3, f"took {seconds:.2f} s"
