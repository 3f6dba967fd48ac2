"""Which mesh axes each logical axis of a parameter is split over. The table is the whole of a model's parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = {
    "vocab": ("stage", "model"),  # embedding and head belong to no stage, so all of them share them
    "heads": ("model",),
    "kv_heads": ("model",),
    "group": (),
    "group_kv": (),
    "mlp": ("model",),
    "experts": (),
    "embed": (),
}
EXPERT_RULES: Rules = RULES | {"experts": ("model",)}  # whole experts, instead of a part of each one's width


def split_over(axes: Sequence[str | None], rules: Rules = RULES) -> tuple[tuple[str, ...], ...]:
    """Logical axes of a parameter -> for each the mesh axes that split it. A mesh axis splits the first that it may.

    Errors: ValueError for a logical axis that has no rule.
    """
    taken: set[str] = set()
    parts: list[tuple[str, ...]] = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"logical axis {axis!r} has no rule; there are {sorted(rules)}")
        part = rules[axis] if axis is not None else ()
        parts.append(() if taken & set(part) else part)
        taken.update(parts[-1])
    return tuple(parts)


def partition_spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """-> the same as a PartitionSpec. Errors: as `split_over`."""
    return PartitionSpec(*(part or None for part in split_over(axes, rules)))
