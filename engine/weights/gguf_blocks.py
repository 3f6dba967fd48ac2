"""ggml's block types: how each stores the elements of a tensor, and how they become float32.

A block type is the layout of its blocks and a function that writes their elements: (blocks [n] of the layout, out
float32 [n, size]). All arithmetic is float32, in the order of ggml's reference (ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


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


def scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> the 8 scales and 8 minima of Q4_K and Q5_K, uint8 [n, 8] each, which d and dmin multiply.

    Twelve bytes hold them with 6 bits each: the first four of either in the low bits of the first and second four
    bytes, whose top bits complete the nibbles of the last four bytes to the other four of either.
    """
    low, middle, high = np.split(blocks["scales"], 3, axis=1)
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    return scales, np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], axis=1)


def _scales_and_offsets(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> the 8 scales and 8 offsets (negative minima) of Q4_K and Q5_K, float32 [n, 8] each."""
    scales, minima = scales_and_minima(blocks)
    return _floats(blocks["d"]) * scales, -_floats(blocks["dmin"]) * minima


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale(_unpack(blocks["quants"], 4, 32), *_scales_and_offsets(blocks), out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    quants = _unpack(blocks["quants"], 4, 32) | _unpack(blocks["high"], 1, 32) << 4
    _scale(quants, *_scales_and_offsets(blocks), out)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    quants = _unpack(blocks["quants"], 4, 64) | _unpack(blocks["high"], 2, 32) << 4
    _scale(quants.view(np.int8) - np.int8(32), _floats(blocks["d"]) * blocks["scales"], None, out)


# Twice what four bits mean, sign, two bits of exponent, one of mantissa: with half the scale, which is finite.
DOUBLED_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def half_scales(exponents: np.ndarray) -> np.ndarray:
    """-> half the powers of two that MXFP4's uint8 exponents stand for, 2^(exponent - 128). float32, same shape"""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)


def _mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale(DOUBLED_E2M1[_unpack(blocks["quants"], 4, 16)], half_scales(blocks["exponent"])[:, None], None, out)
    out += np.float32(0)  # ggml's zeros have no sign


@dataclass(frozen=True)
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
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_CHUNK_ELEMENTS = 1 << 16  # temporaries of one chunk stay in a core's cache


def dequantize(data: np.ndarray, type_name: str) -> np.ndarray:
    """Expand whole blocks of one of `BLOCK_TYPES`. uint8 [bytes] -> float32 [elements]"""
    block = BLOCK_TYPES[type_name]
    return dequantize_blocks(data.view(block.layout), block)


def dequantize_blocks(blocks: np.ndarray, block: BlockType) -> np.ndarray:
    """blocks [n] of the type's layout -> float32 [n * block.size]"""
    out = np.empty((len(blocks), block.size), np.float32)
    step = _CHUNK_ELEMENTS // block.size
    for start in range(0, len(blocks), step):
        block.write(blocks[start : start + step], out[start : start + step])
    return out.reshape(-1)
