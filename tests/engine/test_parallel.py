"""Models on meshes of virtual CPU devices answer as on one device, whatever is split, padded, copied or stacked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("folder", "meshes"),
    [
        ("olmo2", ["4x1x1", "2x1x1h"]),  # 2 KV heads for 4 devices, norms over all heads' width; steps in halves
        ("gpt-oss", ["2x2x1e"]),  # 3 layers in 2 stages, windows beside full attention, sinks, whole experts
    ],
)
def test_answers_on_a_mesh_are_those_of_one_device(folder: str, meshes: list[str]):
    command = [sys.executable, "-m", "tests.engine.parallel_program", folder, "1x1x1", *meshes]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    one = found.pop("1x1x1")
    assert one["hits"]
    for mesh, other in found.items():
        for exact in ("greedy", "drawn", "hits"):
            assert other[exact] == one[exact], (mesh, exact)
        assert other["likely"] == pytest.approx(one["likely"], abs=2e-4), mesh
        for ours, theirs in zip(other["vectors"], one["vectors"], strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5), mesh
