"""How attention heads are spread over devices: KV heads are copied where there are too few, and padded where odd."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class HeadSplit(NamedTuple):
    """KV heads and the query heads of each, as they lie over all devices.

    KV head h becomes heads h * copies to (h + 1) * copies - 1, which share its query heads out in order. What is beyond
    the model's heads is padding: its weights are zero, so that it adds nothing.
    """

    kv_heads: int  # the model's
    group: int  # query heads of each
    copies: int
    all_kv_heads: int  # over all devices, copies and padding included
    own_group: int

    @property
    def is_plain(self) -> bool:
        return (self.all_kv_heads, self.own_group) == (self.kv_heads, self.group)


@cache
def split_heads(kv_heads: int, group: int, devices: int) -> HeadSplit:
    """-> the way that gives a device the fewest KV heads, then the fewest query heads, with the fewest copies."""

    def cost(copies: int) -> tuple[int, int, int]:
        per_device = -(-kv_heads * copies // devices)
        return per_device, per_device * -(-group // copies), copies

    copies = min(range(1, group + 1), key=cost)
    return HeadSplit(kv_heads, group, copies, cost(copies)[0] * devices, -(-group // copies))
