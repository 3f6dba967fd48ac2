"""A reader for GGUF checkpoints (versions 2 and 3) that trusts nothing it reads.

The format is that of ggml's docs/gguf.md. Every length, count and offset is compared with what the file holds before
anything is read or allocated, so opening costs time and memory in proportion to the header alone.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from typing import Any, NoReturn

import numpy as np

from engine.weights.gguf_blocks import BLOCK_TYPES, TYPE_NAMES, dequantize
from engine.weights.stored import BlockTensor, OpenFile

VOCABULARY_NAME = "tokenizer.gguf"  # what a converted model's folder calls the metadata alone

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
        self._metadata_end = header.metadata_end
        # The views that users take keep the mapping alive, so nothing dangles after close().
        self._bytes: np.ndarray | None = np.frombuffer(mapping, np.uint8)
        self._file: OpenFile | None = None

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

    def stored(self, name: str) -> BlockTensor:
        """-> one tensor that is read, and dequantized, piece by piece. KeyError for an unknown name."""
        from engine.weights.gguf_packed import stored_blocks  # which needs JAX: a tokenizer's reader does without

        tensor = self.tensors[name]
        self._file = self._file or OpenFile(self.path)
        return stored_blocks(
            BlockTensor(self._file, tensor.offset, BLOCK_TYPES[tensor.type], tensor.shape), tensor.type
        )

    def without_tensors(self) -> bytes:
        """-> a file with the same metadata and no tensors: what a tokenizer is read from."""
        with open(self.path, "rb") as file:
            magic_and_version, _, rest = file.read(8), file.read(8), file.read(self._metadata_end - 16)
        return magic_and_version + _U64.pack(0) + rest

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
        self.metadata_end = self.position

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
        if kind not in TYPE_NAMES:
            self.fail(field, f"{kind} is no tensor type")
        if (type_name := TYPE_NAMES[kind]) not in BLOCK_TYPES:
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
