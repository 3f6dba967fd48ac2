"""Micro-batches through the stages of a pipeline: every device computes its stage on one, then hands it onward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax

from sharding.axes import Axis

Carry = TypeVar("Carry")


def rotate(
    run: Callable[[Array, Array, Array, Carry], tuple[Array, Carry]], x: Array, carry: Carry, stage: Axis
) -> tuple[Array, Carry]:
    """Send x [M, T, D], M micro-batches, through every stage. For the inside of shard_map.

    run(x [T, D], m, is_real, carry) -> (y [T, D], carry) computes this device's stage on micro-batch m; where it is not
    real, the device has nothing to do yet, or any more, and nothing may come of it. -> what left the last stage
    [M, T, D], right on its devices alone, and the last carry. In M + stages - 1 turns, a stage is idle in stages - 1
    (GPipe, Huang et al. 2019, section 2.3).
    """
    count, place = x.shape[0], stage.index()

    def turn(i: Array, state: tuple[Array, Array, Carry]) -> tuple[Array, Array, Carry]:
        incoming, outputs, carry = state
        m = i - place
        is_real = (m >= 0) & (m < count)
        m = jnp.clip(m, 0, count - 1)
        y, carry = run(jnp.where(place == 0, x[m], incoming), m, is_real, carry)
        outputs = outputs.at[jnp.where(is_real, m, count)].set(y, mode="drop")
        return stage.onward(y), outputs, carry

    start = jnp.zeros_like(x[0]), jnp.zeros_like(x), carry
    _, outputs, carry = lax.fori_loop(0, count + stage.size - 1, turn, start)
    return outputs, carry
