"""Products of tokens with a weight, plain or quantized: one entry for the model, one function a format and platform."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kernels import cpu
from kernels.cuda import product as cuda
from kernels.cuda import vector
from kernels.cuda.matrix import Tile
from kernels.pallas import product as pallas
from kernels.quantized import Joined, QuantizedTensor, Weight, dequantize, quantize_activations

CPU_BLOCK = 1024  # outputs
ONE_TOKEN = Tile(1, 2, 512, warps=2, stages=2)  # of a plain weight's rows on a GPU, where XLA makes poor work of it


def product(x: Array, weight: Weight) -> Array:
    """x [T, *in], weight [*in, *out] as the model sees it -> [T, *out] in x's dtype.

    A plain product is over one axis: over several it may copy the weight, and axes merged here could not be split
    over a mesh.
    """
    if isinstance(weight, Joined):
        return jnp.concatenate([product(x, piece) for piece in weight.pieces], axis=1 + weight.axis)
    flat = x.reshape(x.shape[0], -1)
    if isinstance(weight, QuantizedTensor):
        y = matrix_product(flat, as_matrix(weight), x.dtype)
        return y.reshape(x.shape[0], *weight.outputs)
    if x.ndim > 2:
        weight = weight.reshape(flat.shape[1], *weight.shape[x.ndim - 1 :])
    return jax.lax.dot_general(flat, weight, (((1,), (0,)), ((), ())))


def rows_product(x: Array, rows: Array | QuantizedTensor) -> Array:
    """x [T, D], rows [V, D] -> [T, V] float32."""
    if isinstance(rows, QuantizedTensor):
        return matrix_product(x, rows, jnp.dtype(jnp.float32))
    plain = lambda x, rows: jnp.einsum("td,vd->tv", x, rows, preferred_element_type=jnp.float32)
    if x.shape[0] > 1 or rows.dtype.itemsize > 2:
        return plain(x, rows)
    on_cuda = partial(vector.rows_product, dtype=jnp.dtype(jnp.float32), tile=ONE_TOKEN)
    return jax.lax.platform_dependent(x, rows, cuda=on_cuda, default=plain)


def take_rows(rows: Array | QuantizedTensor, index: Array) -> Array:
    """rows [V, D], index [T] i32 -> [T, D]."""
    if not isinstance(rows, QuantizedTensor):
        return rows[index]
    assert rows.layout.rows == 1
    return dequantize(jax.tree.map(lambda part: part[index], rows), rows.layout.dtype)


def as_matrix(weight: QuantizedTensor) -> QuantizedTensor:
    """-> the weight with all outputs as one axis: values [N, K / packing], scales [N / rows, K / group], ..."""
    return jax.tree.map(lambda part: part.reshape(math.prod(part.shape[:-1]), part.shape[-1]), weight)


def matrix_product(x: Array, weight: QuantizedTensor, dtype: jnp.dtype) -> Array:
    """x [T, K], weight [N, K] -> [T, N] in `dtype`, by what the platform has for the weight's format."""
    plain = partial(reference, dtype=dtype)
    on_cpu = partial(cpu.few_tokens if cpu.supports(x.shape[0], weight) else _in_blocks, dtype=dtype)
    on_cuda = partial(cuda.matrix_product, dtype=dtype)
    on_tpu = partial(pallas.matrix_product, dtype=dtype) if pallas.supports(weight) is None else plain
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, cuda=on_cuda, tpu=on_tpu, default=plain)


def _in_blocks(x: Array, weight: QuantizedTensor, dtype: jnp.dtype) -> Array:
    """As `reference`, for some outputs at a time: what is unpacked of the weight stays in a processor's cache."""
    outputs = weight.outputs[0]
    block = max(size for size in range(1, CPU_BLOCK + 1) if outputs % size == 0)
    if weight.layout.rows > 1 or block in (1, outputs):
        return reference(x, weight, dtype)
    blocks = jax.tree.map(lambda part: part.reshape(-1, block, part.shape[1]), weight)

    def turn(i: Array, out: Array) -> Array:
        own = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, i, keepdims=False), blocks)
        return jax.lax.dynamic_update_slice(out, reference(x, own, dtype), (0, i * block))

    return jax.lax.fori_loop(0, outputs // block, turn, jnp.zeros((x.shape[0], outputs), dtype))


def how_multiplied(weight: QuantizedTensor, platform: str) -> str:
    """-> in words, what a platform's products do with a weight: JAX's name of it, "gpu", "tpu" or "cpu"."""
    if platform == "gpu":
        kind = cuda.kind_of(weight)
        if kind is None:
            return "unpacked by XLA"
        return "unpacked in registers" if kind == cuda.PACKED else f"multiplied as {weight.values.dtype}"
    if platform == "tpu" and pallas.supports(weight) is None:
        return f"multiplied as {weight.values.dtype}" if pallas.stays_narrow(weight) else "unpacked in VMEM"
    return "unpacked in registers" if platform == "cpu" and cpu.supports(1, weight) else "unpacked by XLA"


def reference(x: Array, weight: QuantizedTensor, dtype: jnp.dtype) -> Array:
    """As `matrix_product`, in plain XLA."""
    layout = weight.layout
    if layout.activations == "none":
        return _dot(x, dequantize(weight, x.dtype), jnp.dtype(jnp.float32)).astype(dtype)
    values, scales = quantize_activations(x, layout)
    if layout.activations == "token_group":
        groups = scales.shape[1]
        wide = values.astype(jnp.float32).reshape(x.shape[0], groups, -1) * scales[:, :, None]
        return _dot(wide.reshape(x.shape), dequantize(weight, jnp.float32), jnp.dtype(jnp.float32)).astype(dtype)
    wide = jnp.dtype(jnp.int32 if layout.format == "int8" else jnp.float32)
    y = _dot(values, weight.values, wide).astype(jnp.float32)
    columns = jnp.repeat(weight.scales[:, 0].astype(jnp.float32), layout.rows, total_repeat_length=y.shape[1])
    return (y * scales * columns[None]).astype(dtype)


def _dot(x: Array, rows: Array, dtype: jnp.dtype) -> Array:
    """x [T, K], rows [N, K] -> [T, N] in `dtype`."""
    return jax.lax.dot_general(x, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
