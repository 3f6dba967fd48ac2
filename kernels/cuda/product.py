"""Products with quantized weights on NVIDIA GPUs: which kernel serves a format and a batch, and its tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels.cuda import hopper_narrow, hopper_packed, vector
from kernels.cuda.activations import narrow
from kernels.cuda.grouped import row_blocks
from kernels.cuda.matrix import FEW_OUTPUTS, Groups, Tile
from kernels.cuda.narrow import narrow_product
from kernels.cuda.packed import LEAST, packed_product, supports
from kernels.quantized import QuantizedTensor, dequantize, quantize_activations
from kernels.tuned import file_name, found_for

DEPTH = 128  # inputs of a turn, where so many divide all
THIN = 64  # tokens up to which reading the weight takes longest
LARGE = 1 << 25  # numbers of a weight from which on Mosaic's kernel for packed ones was seen to be the fastest
KERNELS = ("vector", "triton", "inside", "hopper", "hopper_packed", "library")
CHANNEL, BLOCK, PACKED = "channel", "block", "packed"  # what kernels tell apart


class Plan(NamedTuple):
    """How a product is computed.

    kernel: "vector" is for a few tokens, without tensor cores; "triton" unpacks weights, or takes activations that were
    made narrow before; "inside" makes them narrow in each program; "hopper" is Mosaic's for FP8, "hopper_packed" for
    packed weights; "library" leaves the product to XLA, which calls cuBLAS.
    """

    kernel: str
    tile: Tile = Tile(16, 64, 128)


def kind_of(weight: QuantizedTensor) -> str | None:
    """-> the kind of a weight's product, or None where no kernel serves it."""
    layout, groups = weight.layout, weight.scales.shape[-1]
    if layout.activations == "none":
        return PACKED if supports(weight) is None else None
    if layout.activations == "token":
        return CHANNEL if groups == 1 and layout.packing == 1 else None
    group = weight.inputs // groups
    return BLOCK if layout.format == "fp8" and group >= 32 and group & (group - 1) == 0 else None


def default_plan(weight: QuantizedTensor, M: int) -> Plan:
    """-> what serves M tokens and a weight [N, K] where nothing was tuned.

    Few tokens: a weight with few outputs is split over its inputs, so that every multiprocessor has some of it. A
    single token does without tensor cores, but for a weight in blocks with many outputs, which Triton reads faster.
    """
    kind, N, K = kind_of(weight), weight.values.shape[0], weight.inputs
    group = K // weight.scales.shape[1]
    if kind == PACKED and M <= THIN and N * K >= LARGE and hopper_packed.supports(weight) is None:
        tile = hopper_packed.default_tile(weight, M) if on_hopper() else None
        if tile:
            return Plan("hopper_packed", tile)
    if M == 1 and vector.supports(weight) is None and (kind != BLOCK or N <= FEW_OUTPUTS):
        return Plan("vector", Tile(1, 8, 1024, stages=1))
    if kind is None or (kind == CHANNEL and (M > 16 or K & -K < LEAST)) or (kind == PACKED and M > 128):
        return Plan("library")
    if kind == BLOCK and M > 16 and group == hopper_narrow.BLOCK and on_hopper():
        tile = hopper_narrow.default_tile(M, N, K)
        if hopper_narrow.supports(N, K, tile):
            return Plan("hopper", tile)
    splits = 4 if N <= FEW_OUTPUTS and K % (4 * 256) == 0 else 1
    return Plan("triton", triton_tile(weight, M, splits))


def triton_tile(weight: QuantizedTensor, M: int, splits: int = 1) -> Tile:
    """-> Triton's for M tokens where nothing was tuned."""
    depth = min(DEPTH, weight.inputs & -weight.inputs)
    rows = max(16, min(128, 1 << (M - 1).bit_length()))
    if M <= THIN:
        return Tile(rows, 64, depth, splits, stages=5 if rows == 16 else 4)
    if kind_of(weight) == PACKED:
        return Tile(rows, 64, depth, warps=8, stages=2)
    return Tile(rows, 128, depth, 1, 8, 3)


def dtype_name(weight: QuantizedTensor) -> str:
    """-> a weight's format, as names of tuned files have it."""
    layout = weight.layout
    group = f"{weight.inputs // weight.scales.shape[1]}x{layout.rows}"
    extra = [name for name in ("zeros", "minima") if getattr(weight, name) is not None]
    return " ".join([layout.format, group, layout.activations, *extra])


def tuned_plan(weight: QuantizedTensor, M: int, device: str) -> Plan:
    """-> what was found to be best for a device and a batch, or else the default."""
    N, K = weight.values.shape[0], weight.inputs
    name = file_name("product", {"N": N, "K": K}, dtype_name(weight), device)
    entry = found_for(name, M)
    plan = default_plan(weight, M) if entry is None else plan_of(entry, name)
    if plan.kernel == "vector" and M > vector.MOST_TOKENS:  # the nearest batch was so much smaller
        return default_plan(weight, M)
    return plan


def plan_of(entry: dict[str, Any], name: str) -> Plan:
    """-> a file's entry. Errors: ValueError that names the file."""
    sizes = {key: value for key, value in entry.items() if key not in ("kernel", "us", "default_us")}
    if entry.get("kernel") not in KERNELS or set(sizes) - set(Tile._fields):
        raise ValueError(f"kernels/tuned/{name}: {entry} names no kernel and tile; remove the file or tune again")
    return Plan(entry["kernel"], Tile(**sizes))


def matrix_product(x: Array, weight: QuantizedTensor, dtype: jnp.dtype) -> Array:
    """x [M, K], weight [N, K] -> [M, N] in `dtype`, by the kernel that is best for this GPU."""
    plan = tuned_plan(weight, x.shape[0], jax.local_devices()[0].device_kind)
    if plan.kernel == "hopper" and not may_be_hoppers(plan.tile, weight, dtype):
        plan = Plan("triton", Tile(64, 64, 128))
    if plan.kernel == "hopper_packed" and not hopper_packed.takes(x, weight, plan.tile):
        plan = Plan("triton", Tile(64, 64, DEPTH, warps=8)) if x.shape[0] <= 128 else Plan("library")
    return multiply(x, weight, dtype, plan)


def has_groups(weight: QuantizedTensor) -> bool:
    """-> whether `grouped_product` takes a weight [E, N, K]."""
    kind = kind_of(weight)
    return kind in (PACKED, BLOCK) or (kind == CHANNEL and weight.inputs & -weight.inputs >= LEAST)


def grouped_product(
    x: Array, weight: QuantizedTensor, sizes: Array, *, tile: Tile | None = None, interpret: bool = False
) -> Array:
    """As kernels.grouped.grouped_dot: x [R, K] sorted by group, weight [E, N, K], sizes [E] i32 -> [R, N]."""
    R, E = x.shape[0], sizes.shape[0]
    flat: QuantizedTensor = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), weight)
    tile = tile or triton_tile(flat, pl.cdiv(R, E))
    groups = Groups(row_blocks(sizes, R, tile.rows), E)
    return multiply(x, flat, x.dtype, Plan("triton", tile), groups=groups, interpret=interpret)


def may_be_hoppers(tile: Tile, weight: QuantizedTensor, dtype: jnp.dtype) -> bool:
    """-> whether Hopper's kernel takes a product, whatever a file says: it writes numbers of 16 bits."""
    return hopper_narrow.supports(weight.values.shape[0], weight.inputs, tile) and jnp.dtype(dtype).itemsize == 2


def on_hopper() -> bool:
    device = jax.local_devices()[0]
    return device.platform == "gpu" and str(device.compute_capability).startswith("9.")


def multiply(
    x: Array,
    weight: QuantizedTensor,
    dtype: jnp.dtype,
    plan: Plan,
    *,
    groups: Groups | None = None,
    interpret: bool = False,
    multiprocessors: int | None = None,
) -> Array:
    """x [M, K], weight [N, K] -> [M, N] in `dtype`, as the plan says. Triton's kernel alone takes groups."""
    layout, kernel, tile = weight.layout, plan.kernel, plan.tile
    processors: Any = multiprocessors or (kernel.startswith("hopper") and jax.local_devices()[0].core_count)  # type: ignore[attr-defined]
    if kernel == "vector":
        return vector.rows_product(x, weight, dtype, tile=tile, interpret=interpret)
    if kernel == "hopper_packed":
        return hopper_packed.packed_product(x, weight, dtype, tile=tile, multiprocessors=processors)
    if kernel == "library" or kind_of(weight) is None:
        return library_product(x, weight, dtype)
    if layout.activations == "none":
        return packed_product(x, weight, dtype, tile=tile, groups=groups, interpret=interpret)
    if kernel == "inside":
        return narrow_product(x, None, weight.values, weight.scales, dtype, tile=tile, interpret=interpret)
    if layout.activations == "token":
        values, scales = quantize_activations(x, layout)
        scales = scales.T
    else:
        values, scales = narrow(x, weight.inputs // weight.scales.shape[1], interpret=interpret)
    if kernel == "hopper":
        return hopper_narrow.block_product(
            values, scales, weight.values, weight.scales.astype(jnp.float32), jnp.dtype(dtype),
            tile=tile, multiprocessors=processors,
        )  # fmt: skip
    return narrow_product(
        values, scales, weight.values, weight.scales, dtype, tile=tile, groups=groups, interpret=interpret
    )


def library_product(x: Array, weight: QuantizedTensor, dtype: jnp.dtype) -> Array:
    """As `multiply`, by XLA: narrow numbers to cuBLAS if scales are by token and channel, else unpacked in memory."""
    layout = weight.layout
    dot = lambda a, b, wide: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    if layout.activations != "token" or weight.scales.shape[1] > 1:
        return dot(x, dequantize(weight, x.dtype), dtype)
    values, scales = quantize_activations(x, layout)
    # FP8's sums are rounded to x's dtype before they are scaled: as float32 they would be written and read again.
    y = dot(values, weight.values, jnp.int32 if layout.format == "int8" else x.dtype)
    columns = jnp.repeat(weight.scales[:, 0].astype(jnp.float32), layout.rows, total_repeat_length=y.shape[1])
    return (y.astype(jnp.float32) * scales * columns[None]).astype(dtype)
