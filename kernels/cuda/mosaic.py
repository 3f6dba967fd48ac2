"""What the kernels for Hopper GPUs in Pallas-Mosaic-GPU have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.cuda.matrix import SHARED_MEMORY

JAX = (0, 11)  # whose Mosaic they are written for; 0.12 finds no way to store what attention's `store` does
ROOM = SHARED_MEMORY - 1024  # bytes of a program's tiles, beside barriers and what aligns tiles
load: Any = plgpu.load  # an older JAX, for which nothing is compiled here, wants an index too


def why_not_this_jax() -> str | None:
    """-> None, or why the kernels cannot be compiled."""
    if jax.__version_info__[:2] == JAX:
        return None
    return f"no JAX but {'.'.join(map(str, JAX))}, and this is {jax.__version__}"


def for_each(items: int, programs: int, program: Any, do: Callable[[Any, Any], None]) -> None:
    """do(item, i) for each of a program's items, of which it takes every one that is `programs` after the last.

    `i` counts those from 0 on.
    """
    mine = items // programs + (program < items % programs).astype(jnp.int32)
    lax.fori_loop(0, mine, lambda i, _: do(i * programs + program, i), None)
