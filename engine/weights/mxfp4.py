"""MXFP4 weights of a folder (OCP Microscaling Formats 1.0): blocks of 32 four-bit floats that share a power of two.

A tensor is stored as two, NAME_blocks and NAME_scales, which are shown here as the one that they stand for. GGUF files
have them as a block type, with another order of elements (`gguf_blocks.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np

from engine.models.narrow import Storage
from engine.weights.gguf_blocks import DOUBLED_E2M1, half_scales
from engine.weights.packed import Converted, repack
from engine.weights.stored import StoredTensor
from kernels.quantized import Layout

BLOCK = 32  # elements of a block, in 16 bytes


@cache
def _pairs() -> np.ndarray:
    """-> the two bfloat16 that a byte stands for, low bits first, by scale * 256 + byte. uint32 [65536]"""
    byte = np.arange(256)
    doubled = np.stack([DOUBLED_E2M1[byte & 15], DOUBLED_E2M1[byte >> 4]], axis=1)
    with np.errstate(over="ignore"):  # the largest scale makes infinities
        values = doubled * half_scales(byte.astype(np.uint8))[:, None, None]
    return values.astype(ml_dtypes.bfloat16).view(np.uint32).reshape(-1)


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks uint8 [..., 16] of neighbours in pairs, scales uint8 [...] -> bfloat16 [..., 32], which is exact:

    the values have two significant bits, and float32's exponents.
    """
    entries = scales.astype(np.uint16)[..., None] << 8 | blocks
    return np.take(_pairs(), entries, mode="clip").view(ml_dtypes.bfloat16)  # "clip" checks no index


@dataclass(frozen=True)
class MicroscaledTensor:
    """A StoredTensor of blocks uint8 [..., n, 16] and scales uint8 [..., n]: [..., 32 n] in bfloat16."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def storage(self) -> Storage:
        return Storage(Layout("mxfp4", group=BLOCK, split=1), (("values", "uint8"), ("scales", "uint8")))

    def arrays(self, layout: Layout) -> Mapping[str, StoredTensor]:
        """See packed.PackedTensor."""
        run = max(layout.split, BLOCK // 2)  # bytes
        values = Converted(
            self.blocks, (*self.shape[:-1], self.shape[-1] // 2), np.dtype(np.uint8), run, run, repack(1, layout.split)
        )
        return {"values": values, "scales": self.scales}

    def read(self, start: int, out: np.ndarray) -> None:
        """See stored.StoredTensor."""
        first, end = start // BLOCK, -(-(start + out.size) // BLOCK)
        blocks, scales = np.empty((end - first, BLOCK // 2), np.uint8), np.empty(end - first, np.uint8)
        self.blocks.read(first * BLOCK // 2, blocks.reshape(1, -1))
        self.scales.read(first, scales.reshape(1, -1))
        skip = start - first * BLOCK
        out[...] = dequantize(blocks, scales).reshape(-1)[skip : skip + out.size].reshape(out.shape)


def with_dequantized(source: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """-> a folder's tensors, with each pair NAME_blocks and NAME_scales as one, NAME.

    Errors: ValueError that names the tensor.
    """
    shown = dict(tensors)
    for blocks in (name for name in tensors if name.endswith("_blocks")):
        name = blocks.removesuffix("_blocks")
        scales, shape = f"{name}_scales", tensors[blocks].shape
        if len(shape) < 2 or shape[-1] != BLOCK // 2:
            raise ValueError(f"{source}: {blocks} has shape {shape}, expected [..., in / {BLOCK}, {BLOCK // 2}]")
        if scales not in tensors:
            raise ValueError(f"{source}: tensors are missing: {scales}")
        if tensors[scales].shape != shape[:-1]:
            raise ValueError(f"{source}: {scales} has shape {tensors[scales].shape}, expected {shape[:-1]}")
        for part in (blocks, scales):
            if tensors[part].dtype != np.uint8:
                raise ValueError(f"{source}: {part} must be of uint8, is of {tensors[part].dtype}")
        if name in tensors:
            raise ValueError(f"{source}: {name} is there twice, plain and as {blocks}")
        shown[name] = MicroscaledTensor(shown.pop(blocks), shown.pop(scales))
    return shown
