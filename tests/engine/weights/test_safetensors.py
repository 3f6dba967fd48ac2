"""The safetensors reader: what the reference package writes is read back bit for bit; what is malformed is refused."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from engine.weights import safetensors as reader
from engine.weights.safetensors import DTYPES, open_safetensors


def write(path, header: str | bytes | dict, data: bytes = b""):
    """Write a safetensors file with this header, however wrong. -> path."""
    text = json.dumps(header) if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# --- What is right ---


@pytest.mark.parametrize(
    "dtype", ["?", "u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", ml_dtypes.bfloat16]
)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 0, 3), (2, 1, 3, 2)])
def test_reads_what_the_reference_package_writes(tmp_path, dtype, shape):
    bits = np.random.default_rng(0).integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
    array = bits.view(dtype).reshape(shape)
    safetensors.numpy.save_file({"a": array, "b.c": array}, tmp_path / "x.safetensors", {"format": "np {[]}"})
    opened = open_safetensors(tmp_path / "x.safetensors")
    assert set(opened.tensors) == {"a", "b.c"}
    for name in opened.tensors:
        loaded = opened.load(name)
        assert (loaded.dtype, loaded.shape) == (array.dtype, shape)
        assert opened.tensors[name].nbytes == array.nbytes
        assert loaded.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_viewed_with_its_own_values(tmp_path, name):
    expected = np.array([1, 0, 1, 1] if name == "BOOL" else [1, 2, 0.5, 4] if "F" in name else [1, 2, 3, 4])
    expected = expected.astype(DTYPES[name])
    header = {"x": entry(name, (2, 2), (0, expected.nbytes))}
    loaded = open_safetensors(write(tmp_path / "x.safetensors", header, expected.tobytes())).load("x")
    assert loaded.dtype == DTYPES[name]
    assert loaded.tobytes() == expected.tobytes()
    assert loaded.astype(np.float64).tolist() == expected.reshape(2, 2).astype(np.float64).tolist()


def test_fp8_bits_mean_what_the_format_says(tmp_path):
    header = {"e4m3": entry("F8_E4M3", (2,), (0, 2)), "e5m2": entry("F8_E5M2", (2,), (2, 4))}
    opened = open_safetensors(write(tmp_path / "x.safetensors", header, bytes([0x7E, 0x08, 0x7B, 0x04])))
    assert opened.load("e4m3").astype(np.float32).tolist() == [448.0, 2.0**-6]
    assert opened.load("e5m2").astype(np.float32).tolist() == [57344.0, 2.0**-14]


def test_a_view_is_neither_copied_nor_writable_and_outlives_its_reader(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": entry()}, struct.pack("<2f", 1, 2))
    opened = open_safetensors(str(path))
    first, second = opened.load("x"), opened.load("x")
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    del opened
    assert first.tolist() == [1, 2]


def test_a_tensor_that_is_not_aligned_is_read(tmp_path):
    header = {"b": entry("U8", (1,), (0, 1)), "f": entry("F32", (2,), (1, 9))}
    path = write(tmp_path / "x.safetensors", header, b"\x05" + struct.pack("<2f", 1.5, -2))
    assert open_safetensors(path).load("f").tolist() == [1.5, -2]


def test_escapes_spaces_padding_and_any_order_of_keys_are_json_as_usual(tmp_path):
    header = (
        '\n{ "t\\u00e4\\"\\\\" : {"shape" : [ 1 ],\t"data_offsets":[4,8], "dtype":"I32"}\r\n,'
        '"__metadata__":{"k":"{\\"}"}, "first":{"data_offsets":[0,4],"dtype":"I32","shape":[]} }      '
    )
    opened = open_safetensors(write(tmp_path / "x.safetensors", header, struct.pack("<2i", 3, 4)))
    assert list(opened.tensors) == ["first", 'tä"\\']
    assert opened.load('tä"\\').tolist() == [4]
    assert opened.load("first") == 3


def test_a_file_may_hold_no_tensor(tmp_path):
    assert open_safetensors(write(tmp_path / "x.safetensors", "{}")).tensors == {}


def test_unknown_names_are_key_errors(tmp_path):
    with pytest.raises(KeyError, match="other"):
        open_safetensors(write(tmp_path / "x.safetensors", {"x": entry()}, bytes(8))).load("other")


# --- Folders ---


def write_shards(folder, weight_map: dict | None = None, **index):
    """A folder of two shards, a and b in one, c in the other; the index can be told otherwise. -> the folder."""
    arrays = {name: np.full(2, value, np.float32) for value, name in enumerate("abc")}
    safetensors.numpy.save_file({k: arrays[k] for k in "ab"}, folder / "model-1.safetensors")
    safetensors.numpy.save_file({"c": arrays["c"]}, folder / "model-2.safetensors")
    if weight_map is None:
        weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    index = {"metadata": {"total_size": 24, "nested": {"x": [1]}}, "weight_map": weight_map, **index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def test_a_folder_of_shards_is_one_checkpoint(tmp_path):
    opened = open_safetensors(write_shards(tmp_path))
    assert {name: opened.load(name).tolist() for name in opened.tensors} == {"a": [0, 0], "b": [1, 1], "c": [2, 2]}
    assert opened.tensors["c"].file == tmp_path / "model-2.safetensors"


def test_a_folder_with_a_single_file_is_read_from_it(tmp_path):
    write_shards(tmp_path)
    write(tmp_path / "model.safetensors", {"x": entry()}, bytes(8))
    assert list(open_safetensors(tmp_path).tensors) == ["x"]


ONE, TWO = "model-1.safetensors", "model-2.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": ONE, "c": TWO}, "model-1.*holds 1 tensors \\('b'\\)"),
        ({"a": ONE, "b": ONE, "d": ONE, "c": TWO}, "model-1.*lacks 1 tensors \\('d'\\)"),
        ({"a": ONE, "b": TWO, "c": TWO}, "model-1.*holds 1 tensors \\('b'\\)"),
        ({"a": ONE, "b": ONE, "c": "model-3.safetensors"}, "model-3.safetensors: does not exist"),
        ({"a": "../model-1.safetensors"}, "weight_map: 'a': '../model-1.safetensors' is not the plain name"),
        ({"a": "/etc/passwd"}, "weight_map: 'a': '/etc/passwd' is not the plain name"),
        ({"a": "..\\model.safetensors"}, "weight_map: 'a'.*not the plain name"),
        ({"a": ".."}, "weight_map: 'a': '..' is not the plain name"),
        ({"a": ""}, "weight_map: 'a': '' is not the plain name"),
        ({"a": "x\0.safetensors"}, "weight_map: 'a'.*not the plain name"),
        ({"a": "pytorch_model.bin"}, "weight_map: 'a'.*not the plain name of a .safetensors"),
        ({"a": 3}, "weight_map.*value of 'a'"),
        ({"a": [ONE]}, "weight_map.*value of 'a'"),
        ([], "weight_map: byte 0: expected an object"),
        ("x", "weight_map: byte 0: expected an object"),
    ],
)
def test_an_index_must_name_exactly_what_its_shards_hold(tmp_path, weight_map, message):
    write_shards(tmp_path, weight_map)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "size 0"),
        ("{", "truncated"),
        ("[]", "object"),
        ('{"metadata": {}}', "missing required field `weight_map`"),
        ('{"metadata": ' + "[" * 10**5 + "]" * 10**5 + ', "weight_map": {}}', "recursion"),
        ('{"weight_map": ' + "[" * 3000 + "]" * 3000 + "}", "recursion|expected an object"),  # by Python's own limit
        ('{"metadata": NaN, "weight_map": {}}', "malformed"),
        ('{"weight_map": {}, "weight_map": {}}', "weight_map: duplicate key"),
        ('{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}', "'a': duplicate key"),
        ('{"weight_map": {"a": "\\ud800.safetensors"}}', "index: "),
    ],
)
def test_a_malformed_index_is_refused(tmp_path, text, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){path}.*{message}"):
        open_safetensors(tmp_path)


def test_an_index_of_endless_size_is_refused_unread(tmp_path):
    with open(tmp_path / "model.safetensors.index.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="index.json: size 1099511627776"):
        open_safetensors(tmp_path)


def test_what_is_not_there_or_not_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        open_safetensors(tmp_path)
    with pytest.raises(ValueError, match="none.safetensors: does not exist"):
        open_safetensors(tmp_path / "none.safetensors")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match="model.safetensors: is not a plain file"):
        open_safetensors(tmp_path)


# --- Hostile files ---

GOOD = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HOSTILE_HEADERS = {
    "empty header": ("", "expected an object"),
    "no JSON": ("hello", "expected an object, found b'hello"),
    "a list": ("[]", "expected an object"),
    "cut off": ('{"x":' + GOOD, "expected ',' or the object's end"),
    "text behind": ('{"x":' + GOOD + "} {", "expected ',' or the object's end"),
    "zero bytes behind": ('{"x":' + GOOD + "}\0\0", "expected ',' or the object's end"),
    "comma at the end": ('{"x":' + GOOD + ",}", "expected a name"),
    "two commas": ('{"x":' + GOOD + ',,"y":' + GOOD + "}", "expected a name"),
    "name without quotes": ("{x:" + GOOD + "}", "expected a name"),
    "endless name": ('{"' + "x" * 600 + '":' + GOOD + "}", "expected a name of at most 512 bytes"),
    "lone surrogate": ('{"\\ud800":' + GOOD + "}", "header: byte 9: "),
    "bad escape": ('{"\\x":' + GOOD + "}", "byte 9: JSON is malformed"),
    "newline in a name": ('{"x\n":' + GOOD + "}", "expected a name"),
    "nesting of lists": ('{"x":' + "[" * 3000 + "]" * 3000 + "}", "value of 'x'"),
    "nesting of objects": ('{"x":' * 3000 + "1" + "}" * 3000, "value of 'x'"),
    "nesting in a shape": (f'{{"x":{{"dtype":"F32","shape":{"[" * 3000}{"]" * 3000},"data_offsets":[0,8]}}}}', "shape"),
    "nesting in an unknown key": (f'{{"x":{{"y":{"[" * 3000}{"]" * 3000}}}}}', "'x': .*unknown field `y`"),
    "duplicate tensor": ('{"x":' + GOOD + ',"x":' + GOOD + "}", "'x': duplicate key"),
    "duplicate, escaped": ('{"x":' + GOOD + ',"\\u0078":' + GOOD + "}", "'x': duplicate key"),
    "duplicate field": ('{"x":{"dtype":"F16","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "'x': .*duplicate"),
    "field missing": ('{"x":{"dtype":"F32","shape":[2]}}', "'x': .*data_offsets"),
    "field unknown": ('{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"code":1}}', "'x': .*code"),
    "metadata of numbers": ('{"__metadata__":{"a":1}}', "__metadata__.*expected `str`"),
    "metadata of objects": ('{"__metadata__":{"a":{}}}', "__metadata__"),
    "NaN in the shape": ('{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "'x': JSON is malformed"),
    "infinite number": ('{"x":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}', "'x': .*shape"),
    "fraction": ('{"x":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', "'x': .*shape"),
    "true for a number": ('{"x":{"dtype":"F32","shape":[2,true],"data_offsets":[0,8]}}', "'x': .*shape"),
    "number of 5,000 digits": (f'{{"x":{{"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,8]}}}}', "shape"),
    "negative size": ({"x": entry(shape=[-2])}, "'x': .*shape"),
    "dtype unknown": ({"x": entry("Q4_0")}, "'x': dtype 'Q4_0' is none of BOOL"),
    "dtype a number": ({"x": entry(7)}, "'x': .*dtype"),
    "dtype too wide": ({"x": entry("F64")}, r"'x': data_offsets \[0, 8\] span 8 bytes.*takes 16"),
    "shape too large": ({"x": entry(shape=[3])}, r"'x': data_offsets \[0, 8\] span 8 bytes.*takes 12"),
    "shape overflows": ({"x": entry(shape=[2**62, 4, 2])}, "'x': shape .* overflows"),
    "shape overflows to right size": ({"x": entry(shape=[2**63 - 1, 2**63 - 1, 2])}, "'x': shape .* overflows"),
    "shape overflows behind a zero": ({"x": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, "'x': .* overflows"),
    "100 dimensions": ({"x": entry(shape=[1] * 99 + [2])}, "'x': shape has 100 dimensions"),
    "offsets reversed": ({"x": entry(offsets=[8, 0])}, "'x': data_offsets"),
    "offsets negative": ({"x": entry(offsets=[-8, 0])}, "'x': data_offsets"),
    "three offsets": ({"x": entry(offsets=[0, 8, 9])}, "'x': .*data_offsets"),
    "offsets past the end": ({"x": entry(shape=[2**40], offsets=[0, 2**42])}, "cut short"),
    "offsets of 64 bits": ({"x": entry(offsets=[2**64 - 8, 2**64])}, "'x': data_offsets"),
    "hole in front": ({"x": entry("U8", offsets=[6, 8])}, "'x': data_offsets begin at 6.*hole.*0 is expected"),
    "hole": ({"x": entry("U8", offsets=[0, 2]), "y": entry("U8", offsets=[6, 8])}, "'y'.*begin at 6.*hole.*2 is"),
    "overlap": ({"x": entry("U8", [5], [0, 5]), "y": entry("U8", [5], [3, 8])}, "'y'.*begin at 3.*overlaps.*5 is"),
    "the same bytes twice": ({"x": entry(), "y": entry()}, "'y'.*begin at 0.*overlaps"),
    "trailing bytes": ({"x": entry("U8", [4], [0, 4])}, "has trailing bytes"),
    "no tensor for the bytes": ("{}", "has trailing bytes"),
}


def refuses(path, message):
    """Opening `path` is a ValueError that names it and matches; it takes under 1 s (of CPU) and 200 MB."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(ValueError, match=f"(?is){path}.*{message}"):
            open_safetensors(path)
        assert time.process_time() - started < 1
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("header", "message"), HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_a_hostile_header_is_refused(tmp_path, header, message):
    refuses(write(tmp_path / "x.safetensors", header, bytes(8)), message)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    refuses(write(tmp_path / "x.safetensors", b'{"\xff\xfe":' + GOOD.encode() + b"}", bytes(8)), "header: byte 9")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "size 0"),
        (b"\x02\0\0", "ends after 3 of its 8 bytes"),
        (struct.pack("<Q", 2), "2 bytes do not fit in a file of 8"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header length: 18446744073709551615 bytes is more than 100000000"),
        (struct.pack("<Q", 100_000_001) + b"{}", "header length: 100000001 bytes is more than 100000000"),
        (struct.pack("<Q", 100_000_000) + b"{}", "header length: 100000000 bytes do not fit"),
    ],
)
def test_a_header_length_that_cannot_be_is_refused(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refuses(path, message)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "whole.safetensors", {"x": entry(), "y": entry(offsets=[8, 16])}, bytes(16)).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=str(path)):
            open_safetensors(path)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (b"", "expected an object"),  # zero bytes
        (b" ", "expected an object"),
        (b"[", "expected an object"),
        (b'{"a":[[],', "value of 'a'"),
        (b'{"a":{', "value of 'a'"),
        (b'{"', "expected a name"),
    ],
)
def test_the_longest_header_of_rubbish_is_refused_quickly(tmp_path, unit, message):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000))
        for _ in range(100_000_000 // (len(unit) << 20) if unit else 0):
            file.write(unit * (1 << 20))
        file.truncate(8 + 100_000_000)
    refuses(path, message)


def test_more_tensors_than_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_TENSORS", 3)
    header = {name: entry("U8", [0], [0, 0]) for name in "wxyz"}
    refuses(write(tmp_path / "x.safetensors", header), "more than 3 entries")
