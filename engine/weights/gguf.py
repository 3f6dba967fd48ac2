"""A reader for GGUF checkpoints (versions 2 and 3) that trusts nothing it reads, and the block formats' dequantization.

The format is that of ggml's docs/gguf.md. Every length, count and offset is compared with what the file holds before
anything is read or allocated, so opening costs time and memory in proportion to the header alone.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from engine.weights import mxfp4

# More than any model has, and little enough that a hostile header is refused within a second and 200 MB.
MAX_HEADER_BYTES = 1 << 25  # the largest known has 16 MB
MAX_KEYS = 1 << 13
MAX_TENSORS = 1 << 14
MAX_STRINGS = 3 << 19  # in all arrays of a file together; the largest vocabulary has 0.8 million tokens and merges
MAX_NAME_BYTES = 1 << 10
MAX_DIMS = 4

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_CODES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_NUMBERS = {kind: np.dtype(code) for kind, code in _CODES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in numpy's order (ggml's reversed), `type` as ggml names it, bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUFFile:
    """An open checkpoint: `metadata` by key, `tensors` by name. Made by `open_gguf`; a context manager.

    Metadata are int, float, bool and str; arrays of strings are lists, arrays of numbers 1-D numpy arrays.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError(f"{self.path}: magic: the file is empty, not a GGUF file")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _Header(self.path, mapping)
        self.metadata = header.metadata
        self.tensors = header.tensors
        # The views that users take keep the mapping alive, so nothing dangles after close().
        self._bytes: np.ndarray | None = np.frombuffer(mapping, np.uint8)

    def raw(self, name: str) -> np.ndarray:
        """-> the bytes of one tensor, a read-only view of the mapped file. uint8 [nbytes]"""
        if self._bytes is None:
            raise ValueError(f"{self.path}: {name}: the file is closed")
        if name not in self.tensors:
            raise ValueError(f"{self.path}: there is no tensor {name!r}")
        tensor = self.tensors[name]
        return self._bytes[tensor.offset : tensor.offset + tensor.nbytes]

    def load(self, name: str) -> np.ndarray:
        """-> one tensor, dequantized: float32 [*shape], an array of its own."""
        return dequantize(self.raw(name), self.tensors[name].type).reshape(self.tensors[name].shape)

    def close(self) -> None:
        """Let go of the file; views from `raw` stay valid."""
        self._bytes = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF file and parse its header.

    Errors: ValueError naming the file and the field for anything malformed, out of bounds or not supported; OSError if
    the file can't be read.
    """
    return GGUFFile(path)


class _Header:
    """One pass over the header, from the magic to the last tensor's description."""

    def __init__(self, path: str, data: mmap.mmap):
        self.path = path
        self.data = data
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.position = 0
        self.strings_left = MAX_STRINGS
        if data[:4] != b"GGUF":
            self.fail("magic", f"{data[:4]!r} is not GGUF's")
        self.position = 4
        version = self.u32("version")
        if version not in (2, 3):
            hint = "big-endian files are not supported" if version & 0xFFFF == 0 else "2 and 3 are supported"
            self.fail("version", f"{version:#x}: {hint}; convert the model again")
        num_tensors = self.u64("tensor_count")
        num_keys = self.u64("metadata_kv_count")
        # The least a tensor takes is an empty name, a dimension, type and offset; a pair, a key, a type and a byte.
        self.check_count("tensor_count", num_tensors, 8 + 4 + 8 + 4 + 8, MAX_TENSORS)
        self.check_count("metadata_kv_count", num_keys, 8 + 4 + 1, MAX_KEYS)

        self.metadata: dict[str, Any] = {}
        for index in range(num_keys):
            key = self.name(f"metadata[{index}]")
            if key in self.metadata:
                self.fail(f"metadata[{index}]", f"the key {key!r:.100} is there twice")
            self.metadata[key] = self.value(self.u32(f"{key} (type)"), key)

        self.tensors: dict[str, TensorInfo] = {}
        for index in range(num_tensors):
            tensor = self.tensor(f"tensors[{index}]")
            if tensor.name in self.tensors:
                self.fail(f"tensors[{index}]", f"the name {tensor.name!r:.100} is there twice")
            self.tensors[tensor.name] = tensor
        self.place_tensors()

    def fail(self, field: str, problem: str) -> NoReturn:
        raise ValueError(f"{self.path}: {field:.200}: {problem}")

    def take(self, nbytes: int, field: str) -> int:
        """-> where the next `nbytes` start, which the file is known to hold, and go past them."""
        start = self.position
        if nbytes > self.end - start:
            self.fail(field, f"needs {nbytes} bytes at {start}, but {self.limit()}")
        self.position = start + nbytes
        return start

    def limit(self) -> str:
        return f"the {'file' if self.end == len(self.data) else 'longest header supported'} ends at {self.end}"

    def check_count(self, field: str, count: int, least_bytes: int, most: int) -> None:
        if count > most:
            self.fail(field, f"{count} is more than the limit of {most}")
        if count * least_bytes > self.end - self.position:
            self.fail(field, f"{count} do not fit behind {self.position}: {self.limit()}")

    def u32(self, field: str) -> int:
        return _U32.unpack_from(self.data, self.take(4, field))[0]

    def u64(self, field: str) -> int:
        return _U64.unpack_from(self.data, self.take(8, field))[0]

    def string(self, field: str, most: int = MAX_HEADER_BYTES) -> str:
        length = self.u64(f"{field} (length)")
        if length > most:
            self.fail(field, f"{length} bytes are more than the limit of {most}")
        start = self.take(length, field)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            self.fail(field, f"is not UTF-8: {error.reason} at byte {error.start}")

    def name(self, field: str) -> str:
        name = self.string(field, MAX_NAME_BYTES)
        if not name or not name.isprintable():
            self.fail(field, f"must be a name of printable characters, got {name!r:.100}")
        return name

    def value(self, kind: int, field: str) -> Any:
        if kind == _STRING:
            return self.string(field)
        if kind == _BOOL:
            return self.booleans(1, field)[0].item()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind], 1, field)[0].item()
        if kind != _ARRAY:
            self.fail(field, f"{kind} is no value type")
        kind = self.u32(f"{field} (element type)")
        count = self.u64(f"{field} (length)")
        if kind == _STRING:
            return self.strings(count, field)
        if kind == _BOOL:
            return self.booleans(count, field)
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind], count, field)
        self.fail(field, "arrays of arrays are not supported" if kind == _ARRAY else f"{kind} is no element type")

    def numbers(self, dtype: np.dtype, count: int, field: str) -> np.ndarray:
        start = self.take(count * dtype.itemsize, field)
        return np.frombuffer(self.data, dtype, count, start).copy()

    def booleans(self, count: int, field: str) -> np.ndarray:
        array = self.numbers(np.dtype("u1"), count, field)
        if array.size and array.max() > 1:
            self.fail(field, f"a bool must be 0 or 1, but is {array.max()}")
        return array.astype(bool)

    def strings(self, count: int, field: str) -> list[str]:
        # A vocabulary is most of a header, so this loop works on locals.
        self.check_count(f"{field} (length)", count, 8, self.strings_left)
        self.strings_left -= count
        data, position, end, unpack = self.data, self.position, self.end, _U64.unpack_from
        texts: list[str] = []
        try:
            for _ in range(count):
                if end - position < 8:
                    break
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > end:
                    break
                texts.append(data[start:position].decode())
        except UnicodeDecodeError as error:
            self.fail(f"{field}[{len(texts)}]", f"is not UTF-8: {error.reason} at byte {error.start}")
        if len(texts) < count:
            self.fail(f"{field}[{len(texts)}]", f"goes too far: {self.limit()}")
        self.position = position
        return texts

    def tensor(self, field: str) -> TensorInfo:
        """-> a tensor whose offset still counts from the start of the data."""
        name = self.name(field)
        field = f"tensor {name}"
        num_dims = self.u32(f"{field} (number of dimensions)")
        if not 1 <= num_dims <= MAX_DIMS:
            self.fail(field, f"has {num_dims} dimensions; 1 to {MAX_DIMS} are supported")
        shape = tuple(self.u64(f"{field} (dimensions)") for _ in range(num_dims))[::-1]
        kind = self.u32(f"{field} (type)")
        offset = self.u64(f"{field} (offset)")
        if kind not in _TYPE_NAMES:
            self.fail(field, f"{kind} is no tensor type")
        if (type_name := _TYPE_NAMES[kind]) not in BLOCK_TYPES:
            self.fail(field, f"the type {type_name} is not supported; {', '.join(BLOCK_TYPES)} are")
        block = BLOCK_TYPES[type_name]
        if min(shape) == 0:
            self.fail(field, f"the shape {shape} has a dimension of 0")
        if shape[-1] % block.size:
            self.fail(field, f"rows of {shape[-1]} elements are no multiple of {type_name}'s blocks of {block.size}")
        return TensorInfo(name, shape, type_name, offset, math.prod(shape) // block.size * block.layout.itemsize)

    def place_tensors(self) -> None:
        """Make the tensors' offsets count from the file's start, each within the file and clear of the others."""
        alignment = self.metadata.get("general.alignment", 32)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 8 or alignment.bit_count() != 1:
            self.fail("general.alignment", f"must be a power of two from 8 on, but is {alignment!r:.100}")
        data_start = -(-self.position // alignment) * alignment
        end = data_start
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            start = data_start + tensor.offset
            if tensor.offset % alignment:
                self.fail(f"tensor {tensor.name}", f"the offset {tensor.offset} is no multiple of {alignment}")
            if start < end:
                self.fail(f"tensor {tensor.name}", f"its data at {start} overlaps the tensor before it, up to {end}")
            end = start + tensor.nbytes
            if end > len(self.data):
                self.fail(
                    f"tensor {tensor.name}",
                    f"{tensor.type} {list(tensor.shape)} needs {tensor.nbytes} bytes at {start}, "
                    f"but the file ends at {len(self.data)}",
                )
            self.tensors[tensor.name] = dataclasses.replace(tensor, offset=start)


# Dequantization. A block type is the layout of its blocks and a function that writes their elements:
# (blocks [n] of the layout, out float32 [n, size]). All arithmetic is float32, in the order of ggml's reference.


def _unpack(packed: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Split bytes into elements of a few bits. uint8 [n, groups * width] -> uint8 [n, groups * (8 // bits) * width]

    Within a group the lowest bits of all `width` bytes come first, then the next.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    elements = packed.reshape(len(packed), -1, 1, width) >> shifts
    elements &= (1 << bits) - 1
    return elements.reshape(len(packed), -1)


def _scale(quants: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, out: np.ndarray) -> None:
    """out = quants * scale + offset, with one scale and offset [n, groups] for each group of neighbours in a block."""
    groups = out.reshape(*scale.shape, -1)  # a view
    groups[...] = quants.reshape(groups.shape)
    groups *= scale[..., None]
    if offset is not None:
        groups += offset[..., None]


def _floats(halves: np.ndarray) -> np.ndarray:
    """float16 [n] -> float32 [n, 1]"""
    return halves.astype(np.float32)[:, None]


def _copy(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:, 0] = blocks


def _bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    np.left_shift(blocks, np.uint32(16), out=out.view(np.uint32)[:, 0])


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale(_unpack(blocks["quants"], 4, 16).view(np.int8) - np.int8(8), _floats(blocks["d"]), None, out)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale(_unpack(blocks["quants"], 4, 16), _floats(blocks["d"]), _floats(blocks["m"]), out)


def _q5(blocks: np.ndarray) -> np.ndarray:
    return _unpack(blocks["quants"], 4, 16) | _unpack(blocks["high"], 1, 1) << 4


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale(_q5(blocks).view(np.int8) - np.int8(16), _floats(blocks["d"]), None, out)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale(_q5(blocks), _floats(blocks["d"]), _floats(blocks["m"]), out)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale(blocks["quants"], _floats(blocks["d"]), None, out)


def _q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales = _unpack(blocks["scales"], 4, 1)  # a scale and a minimum in turn
    scale = _floats(blocks["d"]) * scales[:, 0::2]
    _scale(_unpack(blocks["quants"], 2, 32), scale, -_floats(blocks["dmin"]) * scales[:, 1::2], out)


def _q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    packed = blocks["scales"]  # 16 of 6 bits: four of each in eight bytes, then two of each in four
    scales = _unpack(packed[:, :8], 4, 8) | _unpack(packed[:, 8:], 2, 4) << 4
    quants = _unpack(blocks["quants"], 2, 32) | _unpack(blocks["high"], 1, 32) << 2
    scale = _floats(blocks["d"]) * (scales.view(np.int8) - np.int8(32))
    _scale(quants.view(np.int8) - np.int8(4), scale, None, out)


def _scales_and_offsets(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> the 8 scales and 8 offsets (negative minima) of Q4_K and Q5_K, float32 [n, 8] each.

    Twelve bytes hold them with 6 bits each: the first four of either in the low bits of the first and second four
    bytes, whose top bits complete the nibbles of the last four bytes to the other four of either.
    """
    low, middle, high = np.split(blocks["scales"], 3, axis=1)
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], axis=1)
    return _floats(blocks["d"]) * scales, -_floats(blocks["dmin"]) * minima


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale(_unpack(blocks["quants"], 4, 32), *_scales_and_offsets(blocks), out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    quants = _unpack(blocks["quants"], 4, 32) | _unpack(blocks["high"], 1, 32) << 4
    _scale(quants, *_scales_and_offsets(blocks), out)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    quants = _unpack(blocks["quants"], 4, 64) | _unpack(blocks["high"], 2, 32) << 4
    _scale(quants.view(np.int8) - np.int8(32), _floats(blocks["d"]) * blocks["scales"], None, out)


def _mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    scale = mxfp4.half_scales(blocks["exponent"])[:, None]
    _scale(mxfp4.DOUBLED[_unpack(blocks["quants"], 4, 16)], scale, None, out)
    out += np.float32(0)  # ggml's zeros have no sign


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How one ggml type stores tensors: elements in a block, a block's bytes, and how they become float32."""

    size: int
    layout: np.dtype
    write: Callable[[np.ndarray, np.ndarray], None]


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")
BLOCK_TYPES = {
    "F32": BlockType(1, np.dtype("<f4"), _copy),
    "F16": BlockType(1, np.dtype("<f2"), _copy),
    "BF16": BlockType(1, np.dtype("<u2"), _bf16),
    "Q4_0": BlockType(32, np.dtype([_D, ("quants", "u1", 16)]), _q4_0),
    "Q4_1": BlockType(32, np.dtype([_D, _M, ("quants", "u1", 16)]), _q4_1),
    "Q5_0": BlockType(32, np.dtype([_D, ("high", "u1", 4), ("quants", "u1", 16)]), _q5_0),
    "Q5_1": BlockType(32, np.dtype([_D, _M, ("high", "u1", 4), ("quants", "u1", 16)]), _q5_1),
    "Q8_0": BlockType(32, np.dtype([_D, ("quants", "i1", 32)]), _q8_0),
    "Q2_K": BlockType(256, np.dtype([("scales", "u1", 16), ("quants", "u1", 64), _D, _DMIN]), _q2_k),
    "Q3_K": BlockType(256, np.dtype([("high", "u1", 32), ("quants", "u1", 64), ("scales", "u1", 12), _D]), _q3_k),
    "Q4_K": BlockType(256, np.dtype([_D, _DMIN, ("scales", "u1", 12), ("quants", "u1", 128)]), _q4_k),
    "Q5_K": BlockType(
        256, np.dtype([_D, _DMIN, ("scales", "u1", 12), ("high", "u1", 32), ("quants", "u1", 128)]), _q5_k
    ),
    "Q6_K": BlockType(256, np.dtype([("quants", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), _D]), _q6_k),
    "MXFP4": BlockType(32, np.dtype([("exponent", "u1"), ("quants", "u1", 16)]), _mxfp4),
}
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_CHUNK_ELEMENTS = 1 << 16  # temporaries of one chunk stay in a core's cache


def dequantize(data: np.ndarray, type_name: str) -> np.ndarray:
    """Expand whole blocks of one of `BLOCK_TYPES`. uint8 [bytes] -> float32 [elements]"""
    block = BLOCK_TYPES[type_name]
    blocks = data.view(block.layout)
    out = np.empty((len(blocks), block.size), np.float32)
    step = _CHUNK_ELEMENTS // block.size
    for start in range(0, len(blocks), step):
        block.write(blocks[start : start + step], out[start : start + step])
    return out.reshape(-1)
