"""Hostile and broken GGUF files: each is refused with the file and the field named, fast and in little memory."""

from __future__ import annotations

import pathlib
import struct
import time
import tracemalloc
from collections.abc import Callable

import pytest

from engine.weights import gguf
from engine.weights.gguf import open_gguf

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10  # value types
F32_TENSOR, Q4_0_TENSOR, IQ4_XS_TENSOR = 0, 2, 23  # tensor types


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def tensor(name: str, dims: list[int], kind: int = F32_TENSOR, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def build(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    num_pairs: int | None = None,
    num_tensors: int | None = None,
    data: bytes = bytes(64),
) -> bytes:
    """-> a file that is sound as far as its arguments are."""
    pairs, tensors = pairs or [], tensors or []
    counts = u64(len(tensors) if num_tensors is None else num_tensors)
    counts += u64(len(pairs) if num_pairs is None else num_pairs)
    header = magic + version + counts + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + values


def nested(depth: int) -> bytes:
    return array(ARRAY, 1) * depth + array(U8, 1, b"\0")


SOUND = build(
    [pair("name", STRING, text("x")), pair("list", ARRAY, array(STRING, 2, text("a") + text("b")))],
    [tensor("a", [4, 2]), tensor("b", [8], offset=32)],
)

# name: (the file, the field that the error must name)
CASES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "magic"),
    "three bytes": (b"GGU", "magic"),
    "bad magic": (build(magic=b"GGML"), "magic"),
    "a zip file": (b"PK\x03\x04" + bytes(100), "magic"),
    "only the magic": (b"GGUF", "version"),
    "version 0": (build(version=u32(0)), "version"),
    "version 1": (build(version=u32(1)), "version"),
    "version 99": (build(version=u32(99)), "version"),
    "big-endian": (build(version=struct.pack(">I", 3)), "version.*big-endian"),
    "no counts": (b"GGUF" + u32(3), "tensor_count"),
    "tensor count 2^40": (build(num_tensors=2**40), "tensor_count"),
    "tensor count 2^64 - 1": (build(num_tensors=2**64 - 1), "tensor_count"),
    "pair count 2^40": (build(num_pairs=2**40), "metadata_kv_count"),
    "pair count 2^64 - 1": (build(num_pairs=2**64 - 1), "metadata_kv_count"),
    "more pairs than there are": (build([pair("a", U8, b"\0")], num_pairs=3, data=b""), "metadata.1."),
    "key length 2^40": (build([u64(2**40) + bytes(40)]), "metadata.0."),
    "key length 2^64 - 1": (build([u64(2**64 - 1) + bytes(40)]), "metadata.0."),
    "empty key": (build([pair("", U8, b"\0")]), "metadata.0."),
    "key of 2,000 characters": (build([pair("k" * 2000, U8, b"\0")]), "metadata.0."),
    "key with an escape sequence": (build([pair("\x1b[2J", U8, b"\0")]), "metadata.0."),
    "key not UTF-8": (build([pair(b"\xff\xfe", U8, b"\0")]), "metadata.0.*UTF-8"),
    "duplicate key": (build([pair("twin", U8, b"\0"), pair("twin", U8, b"\1")]), "metadata.1.*'twin'"),
    "unknown value type": (build([pair("odd", 13, bytes(8))]), "odd: 13"),
    "value type 2^32 - 1": (build([pair("odd", 2**32 - 1, bytes(8))]), "odd"),
    "bool of 2": (build([pair("flag", BOOL, b"\2")]), "flag"),
    "string length 2^40": (build([pair("long", STRING, u64(2**40) + b"x")]), "long"),
    "string length 2^64 - 1": (build([pair("long", STRING, u64(2**64 - 1) + b"x")]), "long"),
    "string not UTF-8": (build([pair("bytes", STRING, text(b"ok\xc3\x28"))]), "bytes.*UTF-8"),
    "string with a lone surrogate": (build([pair("half", STRING, text(b"\xed\xa0\x80"))]), "half.*UTF-8"),
    "array length 2^40": (build([pair("ids", ARRAY, array(U32, 2**40))]), "ids"),
    "array length 2^61, 0 bytes mod 2^64": (build([pair("ids", ARRAY, array(U64, 2**61))]), "ids"),
    "array length 2^64 - 1 of bytes": (build([pair("ids", ARRAY, array(U8, 2**64 - 1))]), "ids"),
    "bools length 2^40": (build([pair("ids", ARRAY, array(BOOL, 2**40))]), "ids"),
    "bools of 7": (build([pair("ids", ARRAY, array(BOOL, 3, b"\0\7\1"))]), "ids"),
    "string array length 2^40": (build([pair("words", ARRAY, array(STRING, 2**40))]), "words"),
    "string array one short": (build([pair("words", ARRAY, array(STRING, 3, text("a")))], data=b""), "words"),
    "string in array of 2^40": (build([pair("words", ARRAY, array(STRING, 1, u64(2**40)))]), "words.0."),
    "string in array not UTF-8": (
        build([pair("words", ARRAY, array(STRING, 2, text("ok") + text(b"\xff")))]),
        "words.1..*UTF-8",
    ),
    "array of no type": (build([pair("ids", ARRAY, array(77, 1, bytes(8)))]), "ids.*77"),
    "array in an array": (build([pair("deep", ARRAY, nested(1))]), "deep"),
    "arrays 3,000 deep": (build([pair("deep", ARRAY, nested(3000))]), "deep"),
    "alignment 0": (build([pair("general.alignment", U32, u32(0))]), "general.alignment"),
    "alignment 1": (build([pair("general.alignment", U32, u32(1))]), "general.alignment"),
    "alignment 48": (build([pair("general.alignment", U32, u32(48))]), "general.alignment"),
    "alignment of text": (build([pair("general.alignment", STRING, text("32"))]), "general.alignment"),
    "alignment true": (build([pair("general.alignment", BOOL, b"\1")]), "general.alignment"),
    "alignment 32.0": (build([pair("general.alignment", F32, struct.pack("<f", 32))]), "general.alignment"),
    "alignment 2^63": (
        build([pair("general.alignment", U64, u64(2**63))], [tensor("w", [4])]),
        "tensor w",
    ),
    "more tensors than there are": (build(tensors=[tensor("w", [4])], num_tensors=2), "tensors.1."),
    "duplicate tensor": (build(tensors=[tensor("w", [4]), tensor("w", [4], offset=32)]), "tensors.1.*'w'"),
    "tensor name 2^40 long": (build(tensors=[u64(2**40) + bytes(60)]), "tensors.0."),
    "tensor without dimensions": (build(tensors=[tensor("w", [])]), "tensor w.*dimensions"),
    "tensor of 5 dimensions": (build(tensors=[tensor("w", [1] * 5)]), "tensor w.*dimensions"),
    "tensor of 2^32 - 1 dimensions": (
        build(tensors=[text("w") + u32(2**32 - 1) + bytes(64)]),
        "tensor w.*dimensions",
    ),
    "dimension 0": (build(tensors=[tensor("w", [4, 0])]), "tensor w"),
    "dimension 2^42": (build(tensors=[tensor("w", [2**42])]), "tensor w"),
    "dimensions whose product is 0 mod 2^64": (build(tensors=[tensor("w", [2**32, 2**32])]), "tensor w"),
    "dimensions of 2^63 - 1": (build(tensors=[tensor("w", [2**63 - 1] * 4)]), "tensor w"),
    "bytes that are 0 mod 2^64": (build(tensors=[tensor("w", [2**62])]), "tensor w"),
    "unknown tensor type": (build(tensors=[tensor("w", [4], kind=99)]), "tensor w.*99"),
    "tensor type 2^32 - 1": (build(tensors=[tensor("w", [4], kind=2**32 - 1)]), "tensor w"),
    "removed tensor type": (build(tensors=[tensor("w", [32], kind=4)]), "tensor w.*4"),
    "unsupported tensor type": (build(tensors=[tensor("w", [256], kind=IQ4_XS_TENSOR)]), "tensor w.*IQ4_XS"),
    "row no multiple of a block": (build(tensors=[tensor("w", [33], kind=Q4_0_TENSOR)]), "tensor w.*33"),
    "blocks across rows": (build(tensors=[tensor("w", [16, 2], kind=Q4_0_TENSOR)]), "tensor w.*16"),
    "offset past the end": (build(tensors=[tensor("w", [4], offset=96)]), "tensor w"),
    "offset 2^63": (build(tensors=[tensor("w", [4], offset=2**63)]), "tensor w"),
    "offset that wraps around": (build(tensors=[tensor("w", [4], offset=2**64 - 32)]), "tensor w"),
    "offset not aligned": (build(tensors=[tensor("w", [4], offset=4)]), "tensor w.*offset 4"),
    "tensors overlap": (build(tensors=[tensor("a", [16]), tensor("b", [4], offset=32)]), "tensor b.*overlaps"),
    "tensors in one place": (build(tensors=[tensor("a", [4]), tensor("b", [4])]), "tensor b.*overlaps"),
    "data one byte short": (build(tensors=[tensor("w", [16])])[:-1], "tensor w"),
    "no data": (build(tensors=[tensor("w", [16])], data=b""), "tensor w"),
}


def refuse(path: pathlib.Path, field: str) -> None:
    """Open a file that must be refused for `field`, within a second of processor time and 200 MB."""
    start = time.process_time()
    with pytest.raises(ValueError, match=f"bad.gguf: {field}"):
        open_gguf(path)
    seconds = time.process_time() - start
    assert seconds < 1, f"took {seconds:.2f} s"
    tracemalloc.start()  # in a second pass, which tracing makes slow
    try:
        with pytest.raises(ValueError, match=f"bad.gguf: {field}"):
            open_gguf(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200e6, f"took {peak / 1e6:.0f} MB"


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_file_is_refused_by_field(case: str, tmp_path: pathlib.Path):
    data, field = CASES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    refuse(path, field)


def test_the_sound_file_opens(tmp_path: pathlib.Path):
    path = tmp_path / "good.gguf"
    path.write_bytes(SOUND)
    assert list(open_gguf(path).tensors) == ["a", "b"]


def test_a_file_cut_anywhere_is_refused(tmp_path: pathlib.Path):
    path = tmp_path / "bad.gguf"
    for length in range(len(SOUND)):
        path.write_bytes(SOUND[:length])
        with pytest.raises(ValueError, match="bad.gguf: "):
            open_gguf(path)


def test_a_file_with_any_byte_changed_opens_or_is_refused(tmp_path: pathlib.Path):
    path = tmp_path / "bad.gguf"
    for position in range(len(SOUND)):
        for value in (0x00, 0xFF):
            path.write_bytes(SOUND[:position] + bytes([value]) + SOUND[position + 1 :])
            try:
                with open_gguf(path) as file:
                    for name in file.tensors:
                        file.load(name)
            except ValueError as error:
                assert str(path) in str(error)


def sparse(path: pathlib.Path, header: bytes) -> None:
    """A file of 200 MB that takes no disk: after the header it is zeros, which read as empty strings and names."""
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(200_000_000)


HUGE_CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "25 million empty strings": (
        lambda: build([pair("words", ARRAY, array(STRING, 24_000_000))]),
        "words",
    ),
    "a string of 190 MB": (lambda: build([pair("long", STRING, u64(190_000_000))]), "long.*limit"),
    "a key of 190 MB": (lambda: build([u64(190_000_000)], num_pairs=1), "metadata.0.*limit"),
    "a string of 190 MB in an array": (
        lambda: build([pair("words", ARRAY, array(STRING, 1, u64(190_000_000)))]),
        "words.0.*longest header",
    ),
    "190 million bytes": (lambda: build([pair("ids", ARRAY, array(U8, 190_000_000))]), "ids.*longest header"),
    "33 MB that take four bytes a character": (
        lambda: build([pair("long", STRING, u64(33_000_000) + "🌍".encode()), pair("next", STRING, b"")]),
        "metadata.1.",
    ),
    "6 million tensors": (lambda: build(num_tensors=6_000_000), "tensor_count"),
    "15 million pairs": (lambda: build(num_pairs=15_000_000), "metadata_kv_count"),
    "16,000 tensors without names": (lambda: build(num_tensors=16_000), "tensors.0."),
    "16,000 tensors, the last of them bad": (
        lambda: build(tensors=[tensor(f"t{i}", [8], offset=32 * i) for i in range(16_000)] + [tensor("w", [8])]),
        "tensor w",
    ),
    "8,000 pairs, the last of them bad": (
        lambda: build([pair(f"k{i}", U8, b"\0") for i in range(8_000)] + [pair("last", 99, b"")]),
        "last",
    ),
}


@pytest.mark.parametrize("case", HUGE_CASES)
def test_a_huge_hostile_file_is_refused_as_fast(case: str, tmp_path: pathlib.Path):
    header, field = HUGE_CASES[case]
    path = tmp_path / "bad.gguf"
    sparse(path, header())
    refuse(path, field)


def test_all_string_arrays_share_one_limit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf, "MAX_STRINGS", 5)
    path = tmp_path / "bad.gguf"
    three = array(STRING, 3, text("ab") * 3)
    path.write_bytes(build([pair("one", ARRAY, three), pair("two", ARRAY, three)]))
    refuse(path, "two.*limit of 2")
