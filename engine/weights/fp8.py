"""FP8 weights of a folder, as DeepSeek-V3 and others have them: a scale for each square of 128 x 128 elements.

NAME.weight of float8_e4m3fn has its scales in NAME.weight_scale_inv, float32 or bfloat16 (the name is DeepSeek's: they
multiply). The pair is shown as one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from engine.models.narrow import Storage
from engine.weights.packed import InMemory
from engine.weights.stored import StoredTensor, read_all
from kernels.quantized import Layout

SQUARE = 128
SUFFIX = "_scale_inv"
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # of a byte
_SQUARES = Storage(
    Layout("fp8", group=SQUARE, rows=SQUARE, activations="token_group"),
    (("values", "float8_e4m3fn"), ("scales", "float32")),
)


@dataclass(frozen=True)
class ScaledTensor:
    """A StoredTensor of weight [out, in] times scales [out / 128, in / 128], rounded up: [out, in] in float32."""

    weight: StoredTensor
    scales: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def storage(self) -> Storage:
        return _SQUARES

    def arrays(self, layout: Layout) -> Mapping[str, StoredTensor]:
        """See packed.PackedTensor."""
        rows = np.repeat(self.scales, SQUARE, axis=0)[: self.shape[0]]
        width = self.shape[1] // (layout.group or SQUARE)
        scales = np.repeat(rows, SQUARE // (layout.group or SQUARE), axis=1)[:, :width]
        return {"values": self.weight, "scales": InMemory(np.ascontiguousarray(scales))}

    def read(self, start: int, out: np.ndarray) -> None:
        """See stored.StoredTensor."""
        width = self.shape[1]
        first, last = start // width, (start + out.size - 1) // width
        stored = np.empty((1, out.size), self.weight.dtype)
        self.weight.read(start, stored)
        rows = np.zeros((last + 1 - first, width), np.float32)  # whole ones, whose ends may be left out
        run = slice(start - first * width, start - first * width + out.size)
        rows.reshape(-1)[run] = np.take(VALUES, stored.view(np.uint8)[0], mode="clip")  # which checks no index
        for square in range(first // SQUARE, last // SQUARE + 1):
            low, high = max(square * SQUARE - first, 0), (square + 1) * SQUARE - first
            rows[low:high] *= np.repeat(self.scales[square], SQUARE)[:width]
        out[...] = rows.reshape(-1)[run].reshape(out.shape)


def with_scales(source: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """-> a folder's tensors, with each weight and its scales as one. Errors: ValueError that names the tensor."""
    shown = dict(tensors)
    for name in (name for name in tensors if name.endswith(f".weight{SUFFIX}")):
        weight = name.removesuffix(SUFFIX)
        if weight not in tensors:
            raise ValueError(f"{source}: tensors are missing: {weight}")
        stored, scales = tensors[weight], tensors[name]
        if stored.dtype != ml_dtypes.float8_e4m3fn:
            raise ValueError(f"{source}: {weight} has scales, but is of {stored.dtype}; float8_e4m3fn is expected")
        squares = tuple(-(-size // SQUARE) for size in stored.shape)
        if len(squares) != 2 or scales.shape != squares:
            raise ValueError(f"{source}: {name} has shape {scales.shape}, expected {squares}: squares of {SQUARE}")
        if scales.dtype not in (np.float32, ml_dtypes.bfloat16):
            raise ValueError(f"{source}: {name} must be of float32 or bfloat16, is of {scales.dtype}")
        del shown[name]
        shown[weight] = ScaledTensor(stored, read_all(scales).astype(np.float32))
    return shown
