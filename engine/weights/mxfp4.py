"""MXFP4 weights (OCP Microscaling Formats 1.0): blocks of 32 four-bit floats that share a power of two.

A Hugging Face folder has them as two tensors, NAME_blocks and NAME_scales, which are shown here as the one they stand
for; a GGUF file as a block type of its own (`gguf.py`), with another order of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

# Twice what the four bits mean, sign, two bits of exponent, one of mantissa: with half the scale, which is finite.
DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12], np.float32)
BLOCK = 32  # elements of a block
# The two elements of a byte, low bits first, next to each other as 64 bits.
_PAIRS = np.stack([DOUBLED[np.arange(256) & 15], DOUBLED[np.arange(256) >> 4]], axis=1).view(np.uint64)[:, 0]


def half_scales(scales: np.ndarray) -> np.ndarray:
    """-> half the powers of two that uint8 exponents stand for, 2^(scale - 128). float32, same shape"""
    return np.ldexp(np.float32(1), scales.astype(np.int32) - 128)


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks uint8 [..., n, 16] of neighbours in pairs, scales uint8 [..., n] -> float32 [..., 32 n]."""
    values = _PAIRS[blocks].view(np.float32)
    values *= half_scales(scales)[..., None]
    return values.reshape(*values.shape[:-2], -1)


def with_dequantized(
    source: str, shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], np.ndarray]
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """-> a folder's tensors, by shape and loader, with those in MXFP4 under the names that they stand for.

    NAME_blocks [experts, out, in / 32, 16] and NAME_scales [experts, out, in / 32], uint8, become NAME [experts, in,
    out], bfloat16, which holds every one of their values exactly. Errors: ValueError that names the tensor.
    """
    shown = dict(shapes)
    quantized: set[str] = set()
    for blocks in (name for name in shapes if name.endswith("_blocks")):
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        shape = shapes[blocks]
        if len(shape) != 4 or shape[-1] != 16:
            raise ValueError(
                f"{source}: {blocks} has shape {shape}, expected [experts, out, in / {BLOCK}, {BLOCK // 2}]"
            )
        if shapes.get(scales) != shape[:-1]:
            raise ValueError(f"{source}: {scales} has shape {shapes.get(scales)}, expected {shape[:-1]}")
        if name in shapes:
            raise ValueError(f"{source}: {name} is there twice, plain and as {blocks}")
        del shown[blocks], shown[scales]
        shown[name] = (shape[0], shape[2] * BLOCK, shape[1])
        quantized.add(name)

    def load_shown(name: str) -> np.ndarray:
        if name not in quantized:
            return load(name)
        blocks, scales = load(f"{name}_blocks"), load(f"{name}_scales")
        for part, array in ((f"{name}_blocks", blocks), (f"{name}_scales", scales)):
            if array.dtype != np.uint8:
                raise ValueError(f"{source}: {part} must be U8, is {array.dtype}")
        experts, width, height = shown[name]
        out = np.empty((experts, height, width), ml_dtypes.bfloat16)
        for expert in range(experts):
            out[expert] = dequantize(blocks[expert], scales[expert])
        return out.transpose(0, 2, 1)

    return shown, load_shown
