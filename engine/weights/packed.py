"""Tensors that checkpoints store in few bits, seen as the arrays of a QuantizedTensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.narrow import Storage
from engine.weights.stored import StoredTensor
from kernels.quantized import Layout, QuantizedTensor, dequantize


class PackedTensor(Protocol):
    """A tensor [*, out, in] in few bits.

    `storage` says what arrays it is made of; its layout's split is how the checkpoint has it, and its rows and group
    may turn out to be too large for the parameter that the tensor is a part of. `arrays` gives them for a layout with
    another split, and fewer rows and inputs in a group: each [*, out, width], scales with an entry for every output.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def storage(self) -> Storage: ...

    def arrays(self, layout: Layout, /) -> Mapping[str, StoredTensor]: ...


def is_packed(tensor: object) -> bool:
    return hasattr(tensor, "storage")


@dataclass(frozen=True)
class InMemory:
    """A StoredTensor that is here already."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, start: int, out: np.ndarray) -> None:
        """See stored.StoredTensor."""
        out[...] = self.array.reshape(-1)[start : start + out.size].reshape(out.shape)


@dataclass(frozen=True)
class Converted:
    """A StoredTensor [*shape] that is made of another one unit by unit: `unit` elements of `source` become `size`."""

    source: StoredTensor
    shape: tuple[int, ...]
    dtype: np.dtype
    unit: int
    size: int
    convert: Callable[[np.ndarray], np.ndarray]  # [n, unit] -> [n, size]

    def read(self, start: int, out: np.ndarray) -> None:
        """See stored.StoredTensor."""
        first, end = start // self.size, -(-(start + out.size) // self.size)
        taken = np.empty((1, (end - first) * self.unit), self.source.dtype)
        self.source.read(first * self.unit, taken)
        made = self.convert(taken.reshape(end - first, self.unit)).reshape(-1)
        skip = start - first * self.size
        out[...] = made[skip : skip + out.size].reshape(out.shape)


def nibbles(packed: np.ndarray, split: int, bits: int = 4) -> np.ndarray:
    """As kernels.quantized.unpack: uint8 [n, K * bits / 8] -> uint8 [n, K]. A split of 1: neighbours share a byte."""
    many = 8 // bits
    runs = packed.reshape(len(packed), -1, 1, max(split * 2 // many, 1))
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (runs >> shifts & ((1 << bits) - 1)).reshape(len(packed), -1)


def packed_nibbles(values: np.ndarray, split: int, bits: int = 4) -> np.ndarray:
    """As kernels.quantized.pack: uint8 [n, K] -> uint8 [n, K * bits / 8]."""
    many = 8 // bits
    parts = values.reshape(len(values), -1, many, max(split * 2 // many, 1))
    packed = parts[:, :, 0].copy()
    for i in range(1, many):
        packed |= parts[:, :, i] << (i * bits)
    return packed.reshape(len(values), -1)


def repack(split: int, wanted: int, bits: int = 4) -> Callable[[np.ndarray], np.ndarray]:
    """-> a function uint8 [n, bytes] -> uint8 [n, bytes] from one split to another."""
    if split == wanted:
        return lambda packed: packed
    return lambda packed: packed_nibbles(nibbles(packed, split, bits), wanted, bits)


def expanded(tensor: PackedTensor) -> InMemory:
    """-> the tensor in float32, as a whole: for one that no product uses as it is."""
    layout, inputs = tensor.storage.layout, tensor.shape[-1]
    group = math.gcd(layout.group, inputs) if layout.group else None
    layout = Layout(layout.format, group, split=layout.split, dtype="float32")
    arrays = {name: jnp.asarray(whole(array)) for name, array in tensor.arrays(layout).items()}
    with jax.default_device(jax.devices("cpu")[0]):
        return InMemory(np.asarray(dequantize(QuantizedTensor(layout, **arrays), "float32")))


def whole(tensor: StoredTensor) -> np.ndarray:
    """-> all of a tensor's elements."""
    if isinstance(tensor, InMemory):
        return tensor.array
    out = np.empty(tensor.shape, tensor.dtype)
    tensor.read(0, out.reshape(1, -1))
    return out
