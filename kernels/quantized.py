"""Weights in few bits: what a QuantizedTensor holds, how its numbers are packed, and what they stand for.

A weight that the model sees as [in, *out] is stored with its outputs first and its K inputs last and without gaps:
that is what products of narrow types want, and how checkpoints of every kind have it. Experts come before the outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

FORMATS = ("int8", "fp8", "int4", "mxfp4", "q4_k", "q6_k")
ACTIVATIONS = ("none", "token", "token_group")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # of four bits
SUPER = 256  # inputs of a superblock of ggml's K types
SPLIT = 128  # of packed weights with a whole number of 256 inputs


@dataclass(frozen=True)
class Layout:
    """How a weight is stored, but for its sizes, which its arrays tell. w stands for one number of it:

    int8: w = value * scale, or value * scale + minimum.
    fp8: w = value * scale, values are float8_e4m3fn.
    int4: w = (value - zero) * scale, or value * scale + minimum; values are 0 to 15, and the zero is 8 without `zeros`.
    mxfp4: w = E2M1[value] * 2 ** (scale - 127), scales are uint8 (OCP Microscaling Formats 1.0).
    q4_k: w = value * scale * super_scale - minimum * super_minimum, scales and minima are uint8 (ggml's Q4_K).
    q6_k: w = (value - 32) * scale * super_scale, scales are int8; `high` holds bits 4 and 5 (ggml's Q6_K).

    `group`: how many neighbouring inputs share a scale, and `rows`: how many neighbours along the last output axis do.
    `split`: values of 4 bits lie two in a byte, those of the inputs i and i + split, low bits first: byte j of a run of
    `split` bytes has the inputs j and j + split of 2 * split. `high` has four in a byte, those of i, i + split / 2, ...
    `activations`: "none" multiplies wide activations; "token" makes them as narrow as the weight first, with a scale
    for each token; "token_group" with one for each token and `group` inputs. `dtype` is what the numbers become where
    they are looked up, as the embedding's are.
    """

    format: str
    group: int | None = None  # None: all inputs
    rows: int = 1
    activations: str = "none"
    split: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        assert self.format in FORMATS and self.activations in ACTIVATIONS, self
        assert (self.split > 0) == (self.packing > 1), self

    @property
    def packing(self) -> int:
        """-> inputs in one of `values`."""
        return 1 if self.format in ("int8", "fp8") else 2


@struct.dataclass
class QuantizedTensor:
    """A quantized weight: arrays of one rank, [*experts, *out, ·], of which the last axis is about the inputs.

    values [*out, K / packing]: int8, float8_e4m3fn or uint8. Other arrays have one entry for `group` inputs
    (super_scales, super_minima: for 256), and scales one for `rows` outputs: [*out[:-1], out[-1] / rows, K / group].
    Scales are float32 or float16 but for what Layout says.
    """

    layout: Layout = struct.field(pytree_node=False)
    values: Array
    scales: Array
    zeros: Array | None = None
    minima: Array | None = None
    high: Array | None = None
    super_scales: Array | None = None
    super_minima: Array | None = None

    @property
    def inputs(self) -> int:
        """-> K."""
        return self.values.shape[-1] * self.layout.packing

    @property
    def outputs(self) -> tuple[int, ...]:
        """-> axes before the inputs."""
        return self.values.shape[:-1]


@struct.dataclass
class Joined:
    """A weight in pieces along an axis of its outputs, each quantized in its own way, or plain."""

    axis: int = struct.field(pytree_node=False)
    pieces: tuple[Array | QuantizedTensor, ...]


Weight = Array | QuantizedTensor | Joined


def split_of(inputs: int) -> int:
    """-> the split for K inputs: 128 where 256 divides K, else the largest power of two that fits."""
    return math.gcd(SPLIT, inputs // 2)


def pack(values: Array, split: int, bits: int = 4) -> Array:
    """values uint8 [..., K] below 2 ** bits -> uint8 [..., K * bits / 8]; see Layout for the order."""
    many = 8 // bits
    parts = values.reshape(*values.shape[:-1], -1, many, split * 2 // many)
    packed = parts[..., 0, :]
    for i in range(1, many):
        packed = packed | parts[..., i, :] << jnp.uint8(i * bits)
    return packed.reshape(*values.shape[:-1], -1)


def unpack(packed: Array, split: int, bits: int = 4) -> Array:
    """As `pack`, the other way round: uint8 [..., K * bits / 8] -> uint8 [..., K]."""
    many = 8 // bits
    runs = packed.reshape(*packed.shape[:-1], -1, split * 2 // many)
    parts = [runs >> jnp.uint8(i * bits) & jnp.uint8((1 << bits) - 1) for i in range(many)]
    return jnp.stack(parts, axis=-2).reshape(*packed.shape[:-1], -1)


def dequantize(weight: QuantizedTensor, dtype: jnp.dtype | str) -> Array:
    """-> what the weight stands for, computed in float32: [*out, K] in `dtype`."""
    layout, values = weight.layout, weight.values
    if layout.packing == 2:
        values = unpack(values, layout.split)
    if weight.high is not None:
        values = values | unpack(weight.high, layout.split, bits=2) << jnp.uint8(4)
    # Groups stay an axis of their own up to the end: XLA makes poor loops of scales that are repeated before.
    values = values.reshape(*values.shape[:-1], -1, layout.group or values.shape[-1])
    if layout.format == "mxfp4":
        w = jnp.asarray(E2M1, jnp.float32)[values]
        # As bits: the CPU's exp2 is not exact. A scale of 0, 2 ** -127, is no normal float32, and so no number here.
        scales = jax.lax.bitcast_convert_type(weight.scales.astype(jnp.uint32) << 23, jnp.float32)
    else:
        w = values.astype(jnp.float32)
        if layout.format == "q6_k":
            w = w - 32
        elif weight.zeros is not None:
            w = w - weight.zeros[..., None].astype(jnp.float32)
        elif layout.format == "int4" and weight.minima is None:
            w = w - 8
        scales = superscaled(weight.scales, weight.super_scales)
    if layout.rows > 1:
        scales = jnp.repeat(scales, layout.rows, axis=-2, total_repeat_length=values.shape[-3])
    w = w * scales[..., None]
    if weight.minima is not None:
        minima = superscaled(weight.minima, weight.super_minima)[..., None]
        w = w - minima if layout.format == "q4_k" else w + minima
    return w.reshape(*w.shape[:-2], -1).astype(dtype)


def superscaled(x: Array, factors: Array | None) -> Array:
    """x [..., n] -> x in float32, times its superblock's factor [..., n / 8 or n / 16] if there are any."""
    x = x.astype(jnp.float32)
    if factors is None:
        return x
    blocks = x.reshape(*factors.shape, -1) * factors[..., None].astype(jnp.float32)
    return blocks.reshape(x.shape)


# From wide numbers


def quantize(w: Array, layout: Layout) -> QuantizedTensor:
    """w [*out, K] -> the nearest in `layout` that symmetric scales give: int8, fp8 or int4, without zeros and minima.

    A scale is the largest size of its numbers over the format's largest: 127, 448; for int4 the number of the largest
    size becomes -8. So |error| <= scale / 2 for int8, scale for int4 (half of it but where +8 would be needed), and for
    fp8 the larger of |w| / 16 and scale / 1024.
    """
    w = w.astype(jnp.float32)
    *out, inputs = w.shape
    group = layout.group or inputs
    blocks = w.reshape(*out[:-1], out[-1] // layout.rows, layout.rows, inputs // group, group)
    largest = jnp.max(jnp.abs(blocks), axis=(-3, -1), keepdims=True)
    if layout.format == "int4":
        low = jnp.min(blocks, axis=(-3, -1), keepdims=True)
        largest = jnp.where(-low >= largest, largest, -largest)
    scale = largest / jnp.float32({"int8": 127, "fp8": 448, "int4": 8}[layout.format])
    scaled = blocks / jnp.where(scale == 0, 1.0, scale)
    if layout.format == "fp8":
        values = jnp.clip(scaled, -448, 448).astype(jnp.float8_e4m3fn)
    elif layout.format == "int8":
        values = jnp.clip(jnp.round(scaled), -127, 127).astype(jnp.int8)
    else:
        values = jnp.clip(jnp.round(scaled) + 8, 0, 15).astype(jnp.uint8)
    values = values.reshape(*out, inputs)
    if layout.packing == 2:
        values = pack(values, layout.split)
    return QuantizedTensor(layout, values, scale.reshape(*out[:-1], out[-1] // layout.rows, inputs // group))


def quantize_activations(x: Array, layout: Layout) -> tuple[Array, Array]:
    """x [T, K] -> values [T, K] in the weight's narrow type, scales [T, 1] or [T, K / group] float32."""
    groups = x.shape[1] // layout.group if layout.activations == "token_group" and layout.group else 1
    blocks = x.astype(jnp.float32).reshape(x.shape[0], groups, -1)
    largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    limit = 127.0 if layout.format == "int8" else 448.0
    scale = jnp.maximum(largest, 1e-10) / jnp.float32(limit)
    scaled = jnp.clip(blocks / scale, -limit, limit)
    values = jnp.round(scaled).astype(jnp.int8) if layout.format == "int8" else scaled.astype(jnp.float8_e4m3fn)
    return values.reshape(x.shape), scale[..., 0]
