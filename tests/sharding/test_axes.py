"""Which way an axis sums."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.axes import Axes, Axis

SMALL = 4


class Marking(NamedTuple):
    """A link that adds nothing up and leaves a mark instead."""

    mark: Array

    def supports(self, x: Array) -> bool:
        return x.size <= SMALL

    def sum(self, x: Array) -> Array:
        return x + self.mark


def test_what_a_link_supports_goes_through_it_and_all_else_is_added_up_by_xla():
    axis = Axis(("model",), 2, Marking(jnp.float32(100)))
    each = jax.vmap(axis.sum, axis_name="model")
    assert each(jnp.ones((2, SMALL))).tolist() == [[101.0] * SMALL] * 2
    assert each(jnp.ones((2, SMALL + 1))).tolist() == [[2.0] * (SMALL + 1)] * 2


def test_one_stage_and_all_devices_are_one_axis_with_one_link():
    model = Axis(("model",), 2, Marking(jnp.float32(1)))
    assert Axes(model).whole is model
    both = Axes(model, Axis(("stage",), 3)).whole
    assert (both.names, both.size, both.link) == (("stage", "model"), 6, None)
