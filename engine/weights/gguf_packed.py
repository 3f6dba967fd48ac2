"""GGUF's quantized tensors as they are kept on the device: which arrays each block type becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from engine.models.narrow import Storage
from engine.weights.gguf_blocks import BLOCK_TYPES, scales_and_minima
from engine.weights.packed import Converted, repack
from engine.weights.stored import BlockTensor, StoredTensor
from kernels.quantized import Layout


class Field(NamedTuple):
    """An array of a type: its dtype, and what a block has of it; blocks [n] -> [n, m]."""

    dtype: str
    of: Callable[[np.ndarray], np.ndarray]


def _column(name: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: blocks[name].reshape(len(blocks), -1)


_D, _M = Field("float16", _column("d")), Field("float16", _column("m"))
_NIBBLES = Field("uint8", _column("quants"))
TYPES: dict[str, tuple[Layout, dict[str, Field]]] = {
    "Q4_0": (Layout("int4", group=32, split=16), {"values": _NIBBLES, "scales": _D}),
    "Q4_1": (Layout("int4", group=32, split=16), {"values": _NIBBLES, "scales": _D, "minima": _M}),
    "Q8_0": (Layout("int8", group=32), {"values": Field("int8", _column("quants")), "scales": _D}),
    "Q4_K": (
        Layout("q4_k", group=32, split=32),
        {
            "values": _NIBBLES,
            "scales": Field("uint8", lambda blocks: scales_and_minima(blocks)[0]),
            "minima": Field("uint8", lambda blocks: scales_and_minima(blocks)[1]),
            "super_scales": _D,
            "super_minima": Field("float16", _column("dmin")),
        },
    ),
    "Q6_K": (
        Layout("q6_k", group=16, split=64),
        {
            "values": _NIBBLES,
            "high": Field("uint8", _column("high")),
            "scales": Field("int8", _column("scales")),
            "super_scales": _D,
        },
    ),
    "MXFP4": (
        Layout("mxfp4", group=32, split=16),
        {"values": _NIBBLES, "scales": Field("uint8", _column("exponent"))},
    ),
}


@dataclass(frozen=True)
class PackedBlocks(BlockTensor):
    """A BlockTensor that may also be had as it is stored."""

    type: str

    @property
    def storage(self) -> Storage:
        layout, fields = TYPES[self.type]
        return Storage(layout, tuple((name, field.dtype) for name, field in fields.items()))

    def arrays(self, layout: Layout) -> Mapping[str, StoredTensor]:
        """See packed.PackedTensor."""
        native, fields = TYPES[self.type]
        raw, size = _Blocks(self), self.block.size
        blocks = max(1, 2 * layout.split // size)  # that have a whole run of split values
        arrays: dict[str, StoredTensor] = {}
        for name, (dtype, of) in fields.items():
            entries = of(np.zeros(1, self.block.layout)).shape[1]
            order = lambda rows: rows
            if name in ("values", "high") and native.split:
                order = repack(native.split, layout.split, bits=2 if name == "high" else 4)
            shape = (*self.shape[:-1], self.shape[-1] // size * entries)
            convert = partial(_convert, of, order, blocks * entries)
            arrays[name] = Converted(raw, shape, np.dtype(dtype), blocks, blocks * entries, convert)
        return arrays


def _convert(
    of: Callable[[np.ndarray], np.ndarray], order: Callable[[np.ndarray], np.ndarray], size: int, units: np.ndarray
) -> np.ndarray:
    return order(np.ascontiguousarray(of(units.reshape(-1))).reshape(-1, size))


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a tensor, as elements of a StoredTensor."""

    tensor: BlockTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (math.prod(self.tensor.shape) // self.tensor.block.size,)

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.block.layout

    def read(self, start: int, out: np.ndarray) -> None:
        """See stored.StoredTensor."""
        self.tensor.file.read(
            self.tensor.offset + start * self.dtype.itemsize, [row.view(np.uint8).data for row in out]
        )


def stored_blocks(tensor: BlockTensor, type_name: str) -> BlockTensor:
    """-> the tensor, with what it is packed as if its type can be kept so."""
    if type_name not in TYPES:
        return tensor
    return PackedBlocks(tensor.file, tensor.offset, BLOCK_TYPES[type_name], tensor.shape, type_name)
