"""Reader of safetensors checkpoints, a file or a sharded folder: checks every byte count, maps the tensors in place.

Format: https://github.com/huggingface/safetensors#format. A file is 8 bytes of header length (little-endian), a JSON
header that gives each tensor's dtype, shape and byte range, and the tensors' bytes without holes. Files come from
strangers: whatever is wrong with one is a ValueError that names it, and costs neither time nor memory to find.
"""

from __future__ import annotations

import math
import mmap
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

import ml_dtypes
import msgspec
import numpy as np

from engine.weights.stored import OpenFile, PlainTensor

SINGLE_NAME = "model.safetensors"  # of a folder that has one file
INDEX_NAME = "model.safetensors.index.json"  # of a folder that has several
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 100_000  # in a file
MAX_INDEX_BYTES = 32 << 20
MAX_INDEX_ENTRIES = 300_000
MAX_VALUE_BYTES = 4 << 20  # one tensor's entry, or the metadata
MAX_NAME_BYTES = 512
MAX_DIMENSIONS = 16

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from byte `offset` of `file`, in C order."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: pathlib.Path
    offset: int
    nbytes: int


class SafeTensors:
    """An open checkpoint. `tensors` says what it holds; `load` gives one without copying, `stored` piece by piece."""

    def __init__(self, tensors: dict[str, TensorInfo], maps: Mapping[pathlib.Path, mmap.mmap]):
        self.tensors = tensors
        self._maps = maps
        self._files: dict[pathlib.Path, OpenFile] = {}

    def stored(self, name: str) -> PlainTensor:
        """-> a tensor that is read piece by piece. KeyError for an unknown name. Errors: ValueError."""
        info = self.tensors[name]
        if info.file not in self._files:
            self._files[info.file] = OpenFile(info.file)
        return PlainTensor(self._files[info.file], info.offset, info.dtype, info.shape)

    def load(self, name: str) -> np.ndarray:
        """-> a read-only view of the file's bytes, valid for as long as it is held. KeyError for an unknown name.

        Views need not be aligned: the format asks for no alignment.
        """
        info = self.tensors[name]
        count = math.prod(info.shape)
        return np.frombuffer(self._maps[info.file], info.dtype, count, info.offset).reshape(info.shape)


def open_safetensors(path: str | pathlib.Path) -> SafeTensors:
    """Open a .safetensors file, or a folder with `model.safetensors` or `model.safetensors.index.json` and its shards.

    ValueError, naming file and field, for everything that is missing, malformed or inconsistent.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return _open_files({path: None})
    single, index = path / SINGLE_NAME, path / INDEX_NAME
    if single.exists():
        return _open_files({single: None})
    if index.exists():
        return _open_files(shards_of(index))
    raise ValueError(f"{path}: holds neither {single.name} nor {index.name}")


def _open_files(files: Mapping[pathlib.Path, set[str] | None]) -> SafeTensors:
    """Open `files`, each with the names that it must hold exactly, if they are known."""
    tensors: dict[str, TensorInfo] = {}
    maps = {}
    for file, expected in files.items():
        maps[file] = _map(file)
        found = _read_header(file, maps[file])
        if expected is not None and found.keys() != expected:
            missing, surplus = sorted(expected - found.keys()), sorted(found.keys() - expected)
            raise ValueError(
                f"{file}: does not match the index: lacks {_some(missing)}; holds {_some(surplus)} that the index "
                "does not place there"
            )
        tensors.update(found)
    return SafeTensors(tensors, maps)


def _map(file: pathlib.Path, largest: int | None = None) -> mmap.mmap:
    """-> the file's bytes, read-only, and never empty."""
    try:
        if not file.is_file():
            raise ValueError(f"{file}: {'is not a plain file' if file.exists() else 'does not exist'}")
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            if size == 0 or (largest is not None and size > largest):
                raise ValueError(f"{file}: size {size} is not in 1..{largest or 'any'}")
            return mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error


# --- The header ---


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]
    data_offsets: tuple[int, int]


_ENTRY = msgspec.json.Decoder(_Entry)
_METADATA = msgspec.json.Decoder(dict[str, str])


def _read_header(file: pathlib.Path, data: mmap.mmap) -> dict[str, TensorInfo]:
    """-> the tensors of one file, by name, in the order of their bytes."""
    if len(data) < 8:
        raise ValueError(f"{file}: header length: the file ends after {len(data)} of its 8 bytes")
    (length,) = struct.unpack_from("<Q", data)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{file}: header length: {length} bytes is more than {MAX_HEADER_BYTES}")
    if 8 + length > len(data):
        raise ValueError(f"{file}: header length: {length} bytes do not fit in a file of {len(data)}")
    where = f"{file}: header"
    tensors = {}
    for name, value in _members(data, 8, 8 + length, _FLAT_OBJECT, MAX_TENSORS, where):
        field = f"{where}: {name!r:.200}"
        if name == "__metadata__":
            _decode(_METADATA, value, field)
        else:
            tensors[name] = _tensor_info(_decode(_ENTRY, value, field), value, file, 8 + length, field)
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = 8 + length
    for name, info in tensors.items():
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise ValueError(
                f"{where}: {name!r:.200}: data_offsets begin at {info.offset - 8 - length}, which {what}: "
                f"{end - 8 - length} is expected"
            )
        end = info.offset + info.nbytes
    if end != len(data):
        what = "is cut short" if end > len(data) else "has trailing bytes"
        raise ValueError(f"{file}: {what}: its tensors end at byte {end}, the file at {len(data)}")
    return tensors


def _tensor_info(entry: _Entry, text: bytes, file: pathlib.Path, start: int, field: str) -> TensorInfo:
    """Check one tensor's entry by itself; `start` is where the file's data begin."""
    if text.count(b'"') != 8:  # three keys and one string; the decoder would take the last of two equal keys
        raise ValueError(f"{field}: has a duplicate key")
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(f"{field}: dtype {entry.dtype!r:.40} is none of {', '.join(DTYPES)}")
    if len(entry.shape) > MAX_DIMENSIONS:
        raise ValueError(f"{field}: shape has {len(entry.shape)} dimensions, more than {MAX_DIMENSIONS}")
    if math.prod(size or 1 for size in entry.shape) * dtype.itemsize >= 2**63:  # a size of 0 hides nothing
        raise ValueError(f"{field}: shape {entry.shape} overflows 64 bits")
    begin, end = entry.data_offsets
    if not 0 <= begin <= end < 2**63:
        raise ValueError(f"{field}: data_offsets [{begin}, {end}] are no range")
    nbytes = math.prod(entry.shape) * dtype.itemsize
    if nbytes != end - begin:
        raise ValueError(
            f"{field}: data_offsets [{begin}, {end}] span {end - begin} bytes, but {entry.dtype} of shape "
            f"{entry.shape} takes {nbytes}"
        )
    return TensorInfo(dtype, tuple(entry.shape), file, start + begin, nbytes)


# --- The index of a sharded checkpoint ---


class _Index(msgspec.Struct):
    weight_map: msgspec.Raw


_INDEX = msgspec.json.Decoder(_Index)


def shards_of(file: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """-> for each shard that an index names, the names of the tensors that it must hold. Errors: ValueError."""
    text = _map(file, MAX_INDEX_BYTES)[:]
    if text.count(b'"weight_map"') > 1:
        raise ValueError(f"{file}: weight_map: duplicate key")
    weight_map = bytes(_decode(_INDEX, text, f"{file}: index").weight_map)
    where = f"{file}: weight_map"
    names: dict[str, set[str]] = {}
    for name, value in _members(weight_map, 0, len(weight_map), _STRING, MAX_INDEX_ENTRIES, where):
        shard = _decode(_TEXT, value, f"{where}: {name!r:.200}")
        if shard in (".", "..") or re.search(r"[/\\\0]", shard) or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{where}: {name!r:.200}: {shard!r:.200} is not the plain name of a .safetensors file in the folder"
            )
        names.setdefault(shard, set()).add(name)
    return {file.parent / shard: names[shard] for shard in sorted(names)}


# --- Strict JSON, a member at a time ---
#
# A general parser would build whatever a hostile file describes (100 MB of "[],[],…" take gigabytes), recurse as deep
# as it nests, and drop duplicate keys. These patterns know the only two shapes that belong here, and never backtrack.

_SPACE = rb"[ \t\r\n]*+"
_QUOTED = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_OPEN = re.compile(_SPACE + rb"\{" + _SPACE)
_CLOSE = re.compile(rb"\}" + _SPACE + rb"\Z")
_COMMA = re.compile(rb"," + _SPACE)
_KEY = re.compile(rb"(" + _QUOTED + rb")" + _SPACE + rb":" + _SPACE)
_STRING = re.compile(rb"(" + _QUOTED + rb")" + _SPACE)
_FLAT_OBJECT = re.compile(rb'(\{(?:[^"{}]++|' + _QUOTED + rb")*+\})" + _SPACE)
_TEXT = msgspec.json.Decoder(str)
T = TypeVar("T")


def _members(
    data: bytes | mmap.mmap, start: int, end: int, value: re.Pattern[bytes], most: int, where: str
) -> Iterator[tuple[str, bytes]]:
    """Yields (key, JSON text of its value) of the object that fills data[start:end], until it is found malformed."""

    def take(pattern: re.Pattern[bytes], what: str, longest: int = MAX_VALUE_BYTES) -> re.Match[bytes]:
        match = pattern.match(data, position, min(end, position + longest))
        if match is None:
            raise ValueError(f"{where}: byte {position}: expected {what}, found {data[position : position + 40]!r}")
        return match

    position = start
    position = take(_OPEN, "an object").end()
    seen: set[str] = set()
    while not _CLOSE.match(data, position, end):
        if seen:
            position = take(_COMMA, "',' or the object's end").end()
        key = take(_KEY, f"a name of at most {MAX_NAME_BYTES} bytes", MAX_NAME_BYTES)
        position = key.end()
        name = _decode(_TEXT, key[1], f"{where}: byte {key.start()}")
        if name in seen:
            raise ValueError(f"{where}: {name!r:.200}: duplicate key")
        if len(seen) == most:
            raise ValueError(f"{where}: has more than {most} entries")
        seen.add(name)
        found = take(value, f"the value of {name!r:.200}, of at most {MAX_VALUE_BYTES} bytes")
        position = found.end()
        yield name, found[1]


def _decode(decoder: msgspec.json.Decoder[T], text: bytes, field: str) -> T:
    """-> what the text says, if it has the decoder's type."""
    try:
        return decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}: {error!s:.300}") from error


def _some(names: list[str]) -> str:
    """-> the first few of them, for a message."""
    shown = ", ".join(f"{name!r:.100}" for name in names[:5])
    return f"{len(names)} tensors" + (f" ({shown}{', …' if len(names) > 5 else ''})" if names else "")
