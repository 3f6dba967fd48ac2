"""Tensors as they lie in files, read piece by piece at offsets: nothing is mapped, nothing is read twice."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.weights.gguf_blocks import BlockType, dequantize_blocks

MAX_PIECES = 512  # of one system call; Linux takes 1024


class OpenFile:
    """A file that any thread may read at any offset; closed when nothing refers to it any more. Errors: ValueError."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, offset: int, pieces: Sequence[memoryview]) -> None:
        """Fill the pieces with the bytes from `offset` on. Errors: ValueError if the file ends or fails before."""
        for first in range(0, len(pieces), MAX_PIECES):
            left = list(pieces[first : first + MAX_PIECES])
            while left:
                try:
                    count = os.preadv(self.descriptor, left, offset)
                except OSError as error:
                    raise ValueError(f"{self.path}: cannot be read at byte {offset}: {error.strerror}") from error
                if count == 0:
                    raise ValueError(f"{self.path}: ends at byte {offset}; it was longer when it was opened")
                offset += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if count:
                    left[0] = left[0][count:]


class StoredTensor(Protocol):
    """A tensor [*shape] of `dtype`, of which any run of elements can be had."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill out [rows, columns] of `dtype` with the elements from `start` on, in C order; rows may lie apart."""


@dataclass(frozen=True)
class PlainTensor:
    """Elements as numpy has them, one after another from byte `offset` on."""

    file: OpenFile
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, start: int, out: np.ndarray) -> None:
        rows = out.view(np.uint8)
        self.file.read(self.offset + start * self.dtype.itemsize, [row.data for row in rows])


@dataclass(frozen=True)
class BlockTensor:
    """Elements in ggml's blocks, which become float32."""

    file: OpenFile
    offset: int
    block: BlockType
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, start: int, out: np.ndarray) -> None:
        first, end = start // self.block.size, -(-(start + out.size) // self.block.size)
        blocks = np.empty(end - first, self.block.layout)
        self.file.read(self.offset + first * self.block.layout.itemsize, [blocks.view(np.uint8).data])
        skip = start - first * self.block.size
        out[...] = dequantize_blocks(blocks, self.block)[skip : skip + out.size].reshape(out.shape)


def read_all(tensor: StoredTensor) -> np.ndarray:
    """-> the whole tensor, an array of its own."""
    out = np.empty(tensor.shape, tensor.dtype)
    if out.size:
        tensor.read(0, out.reshape(1, math.prod(tensor.shape)))
    return out
