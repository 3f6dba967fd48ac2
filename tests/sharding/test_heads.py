"""Attention split over the heads of virtual devices gives what one device gives; parameters are split by one table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from engine.models.params import ParamSpec, map_specs, param_specs
from engine.weights.load import read_config
from kernels.attention import AttentionSpec
from sharding.heads import split_heads
from sharding.rules import RULES, partition_spec

TINY = Path(__file__).parents[1] / "data" / "tiny"

PROGRAM = """
import numpy as np, jax
from dataclasses import replace
from jax.sharding import Mesh
from kernels.attention import BACKENDS, AttentionSpec
from sharding.heads import split_heads
from tests.kernels.cases import CHUNKS, Case, run

mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
plain = BACKENDS["xla"]
split = plain._replace(update_and_attend=split_heads(plain.update_and_attend, mesh))
case = Case("heads", AttentionSpec(4, 2, 64, 0.125), CHUNKS, sinks=True)
one, wanted, *_ = run(case, plain, "float32")
four, _, cache, *_ = run(case, split, "float32")
assert np.abs(four - wanted).max() < 2e-5, np.abs(four - wanted).max()
assert len(cache.k.sharding.device_set) == 4, cache.k.sharding
print("the same")
"""


def test_heads_on_four_devices_attend_as_on_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "the same", done.stderr[-2000:]


def test_heads_that_do_not_divide_are_refused_with_the_numbers():
    mesh = AbstractMesh((2,), ("model",))
    attend = split_heads(lambda *_: None, mesh)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 KV heads cannot be split over 2 devices"):
        attend(None, None, None, None, None, AttentionSpec(3, 1, 64, 1.0))


@pytest.mark.parametrize("folder", sorted(path.name for path in TINY.iterdir()))
def test_every_axis_of_every_family_has_a_rule_and_splits_once(folder: str):
    def check(path: tuple, spec: ParamSpec) -> None:
        parts = [part for part in partition_spec(spec.axes) if part]
        assert len(parts) <= 1, (path, spec)

    map_specs(check, param_specs(read_config(TINY / folder)))


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="'colour' has no rule"):
        partition_spec(("embed", "colour"))
    assert partition_spec(("experts", None, "mlp")) == P("model", None, None)
    assert set(RULES.values()) == {"model", None}
