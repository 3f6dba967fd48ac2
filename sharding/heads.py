"""Attention over a mesh: every device attends with its own KV heads and their part of the cache, and asks no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


def split_heads(attend: Callable[..., tuple[Array, Any]], mesh: Mesh, axis: str = "model") -> Callable[..., Any]:
    """A backend's update_and_attend -> the same over `axis` of a mesh, whose size must divide the KV heads.

    q, k, v and out are split over heads; a cache's leaves over their second axis, of which each device has what its
    own heads' cache_spec says. The batch is everybody's. Errors: ValueError if heads cannot be split so.
    """
    size = mesh.shape[axis]

    def over_heads(
        q: Array, k: Array, v: Array | None, cache: Any, batch: Any, spec: Any, *,
        sinks: Array | None = None, kv_scales: Array | None = None,
    ) -> tuple[Array, Any]:  # fmt: skip
        if spec.num_kv_heads % size:
            raise ValueError(f"{spec.num_kv_heads} KV heads cannot be split over {size} devices")
        own = replace(spec, num_kv_heads=spec.num_kv_heads // size)
        heads = P(None, axis)

        def local(q: Array, k: Array, v: Array | None, cache: Any, batch: Any, options: dict[str, Any]) -> Any:
            return attend(q, k, v, cache, batch, own, **options)

        # An option that is None has no leaf, and so no need of its own entry.
        options = {"sinks": sinks, "kv_scales": kv_scales}
        splits = {"sinks": P(axis), "kv_scales": heads}
        return jax.shard_map(
            local, mesh=mesh, in_specs=(heads, heads, heads, heads, P(), splits), out_specs=(heads, heads),
            check_vma=False,
        )(q, k, v, cache, batch, options)  # fmt: skip

    return over_heads
