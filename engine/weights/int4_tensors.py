"""Weights of folders in 4 bits, as AWQ, GPTQ and compressed-tensors pack them into int32, eight to one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from engine.models.narrow import Storage
from engine.weights.narrow_tensors import Packed, check_scales
from engine.weights.packed import InMemory, packed_nibbles, repack
from engine.weights.stored import StoredTensor, read_all
from kernels.quantized import Layout

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight outputs of an int32, which of its nibbles each is


def awq_weight(
    where: str, values: StoredTensor, zeros: StoredTensor, scales: StoredTensor, *, group: int | None
) -> Packed:
    """values int32 [in, out / 8], zeros int32 [in / group, out / 8], scales [in / group, out] -> one weight [out, in].

    Errors: ValueError, which begins with `where`, for shapes and types that do not fit.
    """
    inputs, out = values.shape[0], values.shape[-1] * 8
    groups = _check(where, (values, zeros), scales, inputs, group, (inputs, out // 8), (None, out // 8), (None, out))

    def arrays(layout: Layout) -> Mapping[str, StoredTensor]:
        own = _eighths(read_all(values))[..., AWQ_ORDER].reshape(inputs, out)
        points = _eighths(read_all(zeros))[..., AWQ_ORDER].reshape(groups, out)
        return _arrays(own.T, read_all(scales).T, points.T, layout)

    return Packed((out, inputs), _storage(group, scales, zeros=True), arrays)


def gptq_weight(
    where: str, values: StoredTensor, zeros: StoredTensor, scales: StoredTensor, order: StoredTensor | None, *,
    group: int | None, symmetric: bool, offset: int,
) -> Packed:  # fmt: skip
    """values int32 [in / 8, out], zeros int32 [in / group, out / 8] less `offset`, scales [in / group, out].

    `order` int32 [in]: each input's group; one that is not input // group is refused. Errors: as awq_weight.
    """
    inputs, out = values.shape[0] * 8, values.shape[-1]
    groups = _check(where, (values, zeros), scales, inputs, group, (inputs // 8, out), (None, out // 8), (None, out))
    _check_order(where, order, inputs, group)

    def arrays(layout: Layout) -> Mapping[str, StoredTensor]:
        own = _eighths(read_all(values)).transpose(1, 0, 2).reshape(out, inputs)
        points = _eighths(read_all(zeros)).reshape(groups, out) + np.uint8(offset)
        if symmetric and np.any(points != 8):
            raise ValueError(f"{where}: sym is true, but its zeros are not all in the middle")
        return _arrays(own, read_all(scales).T, None if symmetric else points.T, layout)

    return Packed((out, inputs), _storage(group, scales, zeros=not symmetric), arrays)


def packed_weight(
    where: str, values: StoredTensor, scales: StoredTensor, zeros: StoredTensor | None, order: StoredTensor | None, *,
    group: int | None,
) -> Packed:  # fmt: skip
    """values int32 [out, in / 8], scales [out, in / group], zeros int32 [out / 8, in / group] -> one weight [out, in].

    Errors: as awq_weight.
    """
    out, inputs = values.shape[0], values.shape[-1] * 8
    packed = (values,) if zeros is None else (values, zeros)
    groups = _check(where, packed, scales, inputs, group, (out, inputs // 8), (out // 8, None), (out, None))
    _check_order(where, order, inputs, group)

    def arrays(layout: Layout) -> Mapping[str, StoredTensor]:
        bytes_of_pairs = read_all(values).view(np.uint8)
        made = repack(1, layout.split)(bytes_of_pairs)
        points = None
        if zeros is not None:
            points = _eighths(read_all(zeros)).transpose(0, 2, 1).reshape(out, groups)
        return _arrays(None, read_all(scales), points, layout) | {"values": InMemory(made)}

    return Packed((out, inputs), _storage(group, scales, zeros=zeros is not None), arrays)


def _check(
    where: str, packed: tuple[StoredTensor, ...], scales: StoredTensor, inputs: int, group: int | None,
    *shapes: tuple[int | None, ...],
) -> int:  # fmt: skip
    """-> the number of groups, which stands for None in the shapes of packed tensors and scales. Errors: ValueError."""
    if inputs % (group or inputs):
        raise ValueError(f"{where}: {inputs} inputs are no whole number of groups of {group}")
    groups = inputs // (group or inputs)
    wanted = [tuple(groups if size is None else size for size in shape) for shape in shapes]
    for tensor, shape in zip((*packed, scales), [*wanted[: len(packed)], wanted[-1]], strict=True):
        if tensor.shape != shape or math.prod(shape) == 0:
            raise ValueError(f"{where}: a part of it has shape {tensor.shape}, expected {shape}")
    for tensor in packed:
        if tensor.dtype != np.int32:
            raise ValueError(f"{where}: its values and zeros must be of int32, are of {tensor.dtype}")
    check_scales(where, scales)
    return groups


def _check_order(where: str, order: StoredTensor | None, inputs: int, group: int | None) -> None:
    """Errors: ValueError for inputs in another order than their groups'."""
    if order is None:
        return
    if order.shape != (inputs,) or order.dtype != np.int32:
        raise ValueError(f"{where}: g_idx must be int32 [{inputs}], is {order.dtype} {order.shape}")
    found = read_all(order)
    if np.any(found != -1) and not np.array_equal(found, np.arange(inputs) // (group or inputs)):
        raise ValueError(f"{where}: inputs in the order of their activations (desc_act, actorder) are not supported")


def _eighths(packed: np.ndarray) -> np.ndarray:
    """int32 [*] -> its nibbles, low bits first: uint8 [*, 8]."""
    low_first = np.ascontiguousarray(packed).view(np.uint8).reshape(*packed.shape, 4)
    return np.stack([low_first & 15, low_first >> 4], axis=-1).reshape(*packed.shape, 8)


def _storage(group: int | None, scales: StoredTensor, *, zeros: bool) -> Storage:
    kind = "float16" if scales.dtype == np.float16 else "float32"
    names = (("values", "uint8"), ("scales", kind), *((("zeros", "uint8"),) if zeros else ()))
    return Storage(Layout("int4", group=group, split=1), names)


def _arrays(
    values: np.ndarray | None, scales: np.ndarray, zeros: np.ndarray | None, layout: Layout
) -> dict[str, StoredTensor]:
    """values uint8 [out, in], scales and zeros [out, groups] -> the arrays of a layout."""
    made: dict[str, StoredTensor] = {}
    if values is not None:
        made["values"] = InMemory(packed_nibbles(np.ascontiguousarray(values), layout.split))
    kind = np.float16 if scales.dtype == np.float16 else np.float32
    made["scales"] = InMemory(scales.astype(kind))
    if zeros is not None:
        made["zeros"] = InMemory(np.ascontiguousarray(zeros))
    return made
