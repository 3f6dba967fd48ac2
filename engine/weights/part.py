"""A block of a parameter, and the tensor that it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A block of a parameter: parameter[at] = tensor[rows].reshape(view)[take].transpose(order), in the block's shape.

    `offset` is added, in float32. All else but the last reshape is a view, so that a slice of a block reads no more
    than that slice's bytes.
    """

    tensor: str
    shape: tuple[int, ...]  # that the checkpoint must have
    view: tuple[int, ...]
    order: tuple[int, ...]
    block: tuple[int, ...]  # shape of parameter[at]
    at: tuple[slice, ...] = ()
    rows: tuple[int, int] | None = None  # first and end; None: all
    take: tuple[slice, ...] = ()
    offset: float = 0.0
