"""The mesh's groups, which logical axes are split over which of its axes, and how heads are spread."""

from __future__ import annotations

from pathlib import Path

import pytest
from jax.sharding import PartitionSpec as P

from engine.models.params import ParamSpec, map_specs, param_specs
from engine.weights.load import read_config
from sharding.heads import HeadSplit, split_heads
from sharding.mesh import device_grid, groups, replica_meshes
from sharding.rules import EXPERT_RULES, RULES, partition_spec, split_over

TINY = Path(__file__).parents[1] / "data" / "tiny"


def test_eight_devices_with_tp_2_and_pp_4_are_four_tensor_groups_and_two_pipeline_groups():
    found = groups(tensor_parallel=2, pipeline_parallel=4)
    assert found.tensor == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found.pipeline == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert found.data == [[0], [1], [2], [3], [4], [5], [6], [7]]


def test_replicas_are_furthest_apart():
    assert groups(2, 2, 2).data == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups(2, 2, 2).tensor == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert device_grid(2, 1, 4).tolist() == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_too_few_devices_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="data_parallel_size 2: needs 16 devices, and there are 8"):
        replica_meshes(range(8), 4, 2, 2)


@pytest.mark.parametrize(
    ("kv_heads", "group", "devices", "all_kv_heads", "copies", "own_group"),
    [
        (8, 4, 8, 8, 1, 4),
        (8, 8, 16, 16, 2, 4),  # fewer KV heads than devices: each is on two, which share its queries
        (3, 3, 2, 4, 1, 3),  # an odd number: one is padding
        (3, 3, 4, 4, 1, 3),
        (3, 3, 8, 8, 2, 2),
        (1, 8, 4, 4, 4, 2),
        (2, 1, 8, 8, 1, 1),  # nothing to share: most devices have padding alone
    ],
)
def test_kv_heads_are_copied_where_there_are_too_few_and_padded_where_odd(
    kv_heads: int, group: int, devices: int, all_kv_heads: int, copies: int, own_group: int
):
    assert split_heads(kv_heads, group, devices) == HeadSplit(kv_heads, group, copies, all_kv_heads, own_group)


@pytest.mark.parametrize("rules", [RULES, EXPERT_RULES], ids=["width", "experts"])
@pytest.mark.parametrize("folder", sorted(path.name for path in TINY.iterdir()))
def test_every_axis_of_every_family_has_a_rule_and_a_mesh_axis_splits_once(folder: str, rules):
    def check(path: tuple, spec: ParamSpec) -> None:
        names = [name for part in split_over(spec.axes, rules) for name in part]
        assert len(names) == len(set(names)), (path, spec)

    map_specs(check, param_specs(read_config(TINY / folder)))


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="'colour' has no rule"):
        partition_spec(("embed", "colour"))


def test_experts_are_split_by_width_or_as_wholes():
    axes = ("experts", None, "mlp")
    assert partition_spec(axes) == P(None, None, "model")
    assert partition_spec(axes, EXPERT_RULES) == P("model", None, None)
