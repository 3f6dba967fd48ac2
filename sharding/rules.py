"""Which mesh axis each logical axis of a parameter is split over. The table is the whole of a model's parallelism."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import PartitionSpec

RULES: dict[str, str | None] = {
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "experts": "model",
    "embed": None,
}


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes of a parameter -> its PartitionSpec. An axis of the mesh splits one of them, the first it may.

    Errors: ValueError for a logical axis that has no rule.
    """
    taken: set[str] = set()
    parts: list[str | None] = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"logical axis {axis!r} has no rule; there are {sorted(RULES)}")
        part = RULES[axis] if axis is not None else None
        parts.append(part if part not in taken else None)
        taken.update({part} if part else ())
    return PartitionSpec(*parts)
