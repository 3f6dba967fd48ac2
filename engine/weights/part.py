"""A block of a parameter, and the tensor that it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """-> the block, from the stored tensor [*shape]."""
        rows = tensor if self.rows is None else tensor[slice(*self.rows)]
        block = rows.reshape(self.view)[self.take].transpose(self.order).reshape(self.block)
        return block.astype(np.float32) + np.float32(self.offset) if self.offset else block
