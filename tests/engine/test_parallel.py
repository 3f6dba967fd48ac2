"""Models on meshes of virtual CPU devices answer as on one device, whatever is split, padded, copied or stacked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.processes import ROOT, run_module

LLAMA = ROOT / "tests" / "data" / "tiny" / "llama3"


@pytest.mark.parametrize(
    ("folder", "meshes"),
    [
        ("olmo2", ["4x1x1", "2x1x1h"]),  # 2 KV heads for 4 devices, norms over all heads' width; steps in halves
        ("gpt-oss", ["2x2x1e"]),  # 3 layers in 2 stages, windows beside full attention, sinks, whole experts
    ],
)
def test_answers_on_a_mesh_are_those_of_one_device(folder: str, meshes: list[str]):
    check(folder, *meshes)


def test_three_kv_heads_of_three_queries_are_padded_for_two_devices(tmp_path: Path):
    shape = dict(num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((LLAMA / "config.json").read_text()) | shape))
    (tmp_path / "goldens.json").write_text((LLAMA / "goldens.json").read_text())
    check(str(tmp_path), "2x1x1")


def check(folder: str, *meshes: str) -> None:
    found = run_module("tests.engine.parallel_program", folder, "1x1x1", *meshes)
    one = found.pop("1x1x1")
    assert one["hits"]
    for mesh, other in found.items():
        for exact in ("greedy", "drawn", "hits"):
            assert other[exact] == one[exact], (mesh, exact)
        assert other["likely"] == pytest.approx(one["likely"], abs=2e-4), mesh
        for ours, theirs in zip(other["vectors"], one["vectors"], strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5), mesh
