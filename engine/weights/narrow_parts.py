"""Parts of parameters that are stored in few bits: the same rows, with their inputs last and packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.models.narrow import INPUTS, Split
from engine.weights.part import Part

ALL = slice(None)


def narrow_part(part: Part, name: str, width: int) -> Part:
    """-> what `part`, of the parameter called `name`, is of an array with `width` entries for all inputs."""
    inputs, cut = INPUTS[name], len(part.view)
    while math.prod(part.view[cut:]) != part.shape[-1]:
        cut -= 1
    at = [*part.at, *[ALL] * (len(part.block) - len(part.at))]
    kept = [i for i in range(len(part.block)) if i not in inputs]
    return replace(
        part,
        shape=(*part.shape[:-1], width),
        view=(*part.view[:cut], width),
        order=(*(axis for axis in part.order if axis < cut), cut),
        block=(*(part.block[i] for i in kept), width),
        at=tuple(at[i] for i in kept),
        take=part.take[:cut],
    )


def parts_of_piece(parts: Sequence[Part], how: Split, index: int) -> list[Part]:
    """-> the parts of one piece of a parameter, with places counted from its start."""
    first, end, _ = how.pieces[index]
    at = lambda part: (*part.at[: how.axis], slice(0, end - first), *part.at[how.axis + 1 :])
    return [replace(part, at=at(part)) for part in parts if part.at[how.axis] == slice(first, end)]


def merge_rows(scales: np.ndarray, rows: int, source: str) -> np.ndarray:
    """scales [*, out, n] -> [*, out / rows, n]. Errors: ValueError if `rows` neighbours do not share theirs."""
    blocks = scales.reshape(*scales.shape[:-2], -1, rows, scales.shape[-1])
    if not np.array_equal(blocks, np.broadcast_to(blocks[..., :1, :], blocks.shape)):
        raise ValueError(f"{source}: blocks of scales do not end where the parts of a fused weight do")
    return np.ascontiguousarray(blocks[..., 0, :])
