"""Weights of folders in 8 bits with a scale for each output, or for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from engine.models.narrow import Storage
from engine.weights.packed import InMemory, expanded
from engine.weights.stored import StoredTensor, read_all
from kernels.quantized import Layout

SCALES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True)
class Packed:
    """A packed.PackedTensor [out, in] whose arrays are made when they are wanted."""

    shape: tuple[int, ...]
    storage: Storage
    arrays: Callable[[Layout], Mapping[str, StoredTensor]]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, start: int, out: np.ndarray) -> None:
        """See stored.StoredTensor. Expands the whole tensor each time; for more than one run, use packed.expanded."""
        expanded(self).read(start, out)


def scaled_weight(where: str, weight: StoredTensor, scales: StoredTensor, layout: Layout) -> Packed:
    """weight [out, in] of 8 bits, scales [out, 1], [out], [1] or [] -> the two as one.

    Errors: ValueError, which begins with `where`, if they do not fit each other or the layout.
    """
    wanted = np.dtype(np.int8) if layout.format == "int8" else np.dtype(ml_dtypes.float8_e4m3fn)
    if weight.dtype != wanted or len(weight.shape) != 2:
        found = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"{where} has a scale, but is of {found}; {wanted} [out, in] is expected")
    out = weight.shape[0]
    if math.prod(scales.shape) not in (1, out) or len(scales.shape) > 2:
        raise ValueError(f"{where}: its scales have shape {scales.shape}, expected [{out}, 1] or one for all")
    check_scales(where, scales)

    def arrays(layout: Layout) -> Mapping[str, StoredTensor]:
        column = read_all(scales).astype(np.float32).reshape(-1, 1)
        return {"values": weight, "scales": InMemory(np.broadcast_to(column, (out, 1)).copy())}

    names = (("values", str(wanted)), ("scales", "float32"))
    return Packed(weight.shape, Storage(layout, names), arrays)


def check_scales(where: str, scales: StoredTensor) -> None:
    """Errors: ValueError unless scales are of a type that they may have."""
    if scales.dtype not in SCALES:
        raise ValueError(f"{where}: its scales must be of float32, float16 or bfloat16, are of {scales.dtype}")
