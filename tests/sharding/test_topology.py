"""Tensor parallel inside the fast domain; stages or replicas across slow links; the reason is one line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sharding.topology import Topology, choose, read_topology

GIB = 1 << 30
V5E = Topology(16, 16, "ICI", "the data centre's network")
NVLINK = Topology(8, 8, "NVLink", "the network")
PCIE = Topology(4, 1, "nothing", "PCIe")


@pytest.mark.parametrize(
    ("topology", "weights", "memory", "kv_heads", "sizes"),
    [
        (V5E, 131 * GIB, 16 * GIB, 8, (16, 1, 1)),  # 70B: more devices than KV heads, since it must fit
        (V5E, 15 * GIB, 16 * GIB, 8, (8, 1, 2)),
        (NVLINK, 15 * GIB, 141 * GIB, 8, (8, 1, 1)),
        (NVLINK, 1 * GIB, 141 * GIB, 2, (2, 1, 4)),
        (PCIE, 15 * GIB, 24 * GIB, 8, (1, 2, 2)),  # too large for one: two stages, twice
        (PCIE, 1 * GIB, 24 * GIB, 8, (1, 1, 4)),
    ],
)
def test_the_mesh_follows_from_links_and_sizes(topology, weights, memory, kv_heads, sizes):
    choice = choose(topology, weights, memory, kv_heads, layers=32)
    assert choice[:3] == sizes
    assert "\n" not in choice.reason


def test_processes_of_one_engine_are_stages_where_they_cannot_share_a_layer():
    two_hosts = Topology(8, 4, "NVLink", "the network")
    choice = choose(two_hosts, GIB, 141 * GIB, kv_heads=8, layers=32, processes=2)
    assert choice[:3] == (4, 2, 1)
    assert choice.reason.endswith("4 devices share a layer, over NVLink; 2 stages over the network")


def test_links_are_read_from_the_devices():
    device = lambda platform, process=0, **more: SimpleNamespace(platform=platform, process_index=process, **more)
    slices = [device("tpu", slice_index=i // 4) for i in range(8)]
    assert read_topology(slices)[:3] == (8, 4, "ICI")
    assert read_topology([device("gpu", i // 2) for i in range(4)], lambda index: 18)[:3] == (4, 2, "NVLink")
    assert read_topology([device("gpu")] * 4, lambda index: 0) == (4, 1, "nothing", "PCIe")
    assert read_topology([device("cpu")] * 3)[:2] == (3, 3)
