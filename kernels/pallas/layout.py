"""How one layer's keys and values lie in pages, so that a head's part of a page is whole tiles of the TPU's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec

LANES = 128  # a tile's last axis
SUBLANES = 8  # tokens: what a copy may start and end at, for every dtype
EDGE = 16  # tokens: what a load or store of queries may start and end at


def ceil_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """A layer's pages are [pages, channels, page_size, lanes]; lanes are the head's size, padded to whole tiles.

    Heads of up to 64 share a channel with their values, so that no tile is half empty; larger ones have a channel for
    keys and one for values. Values that are parts of their keys have no place of their own.
    """

    heads: int
    channels: int
    lanes: int
    value_lane: int  # where a value starts in its channel
    value_dim: int

    def value_channel(self, head):
        """-> the channel that holds the values of a head; `head` may be traced."""
        return head if self.channels == self.heads else self.heads + head


def layout_of(spec: AttentionSpec) -> Layout:
    heads, size = spec.num_kv_heads, spec.head_dim
    lanes = ceil_to(size, LANES)
    if spec.value_dim is not None:
        return Layout(heads, heads, lanes, 0, spec.value_dim)
    if 2 * size <= LANES:
        return Layout(heads, heads, LANES, LANES // 2, size)
    return Layout(heads, 2 * heads, lanes, 0, size)
