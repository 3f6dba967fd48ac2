"""The machine's own limits, measured: what benchmarks hold their figures against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def seconds(run: Callable[..., Any], *arguments: Any, repeat: int = 10, rounds: int = 3) -> float:
    """-> the best of `rounds` of the time of one call, from `repeat` calls in flight together."""
    jax.block_until_ready(run(*arguments))
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready([run(*arguments) for _ in range(repeat)][-1])
        best = min(best, (time.perf_counter() - started) / repeat)
    return best


def copy_bandwidth(size: int = 1 << 30) -> float:
    """-> bytes read and written a second, by the better of a copy and of an addition."""
    x = jnp.ones(size // 4, jnp.float32)
    ways = jax.jit(lambda x: x + 1), lambda x: jnp.array(x, copy=True)
    return 2 * size / min(seconds(way, x) for way in ways)


def matmul_rate(size: int = 8192) -> float:
    """-> FLOP/s of a product of square bfloat16 matrices of random numbers."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return 2 * size**3 / seconds(jax.jit(lambda a, b: a @ b), a, b)
