"""The real TPU compiler takes the kernel, and its schedule has not become worse than the committed table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TABLE = json.loads((Path(__file__).parent / "report.json").read_text())
SLACK = 1.05  # of what the committed table says


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> dict[str, dict[str, Any]]:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler, libtpu, is for Linux on x86-64 alone")
    out = tmp_path_factory.mktemp("report") / "table.json"
    command = [sys.executable, "scripts/tpu_report.py", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=600, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", TABLE)
def test_compiled_kernel_is_no_worse_than_the_committed_table(fresh, name: str):
    row, committed = fresh[name], TABLE[name]
    assert "error" not in row, row
    assert row["temporaries"] <= 64 << 10
    assert row["aliased"] == committed["aliased"]
    assert row["bundles"] <= SLACK * committed["bundles"]
    assert row["spill_share"] <= committed["spill_share"] + 0.01
    assert row["mxu"] >= committed["mxu"] / SLACK
    if "per_token" in row:
        assert row["per_token"] <= SLACK * committed["per_token"]
        assert row["moved_over_must"] <= min(1.05, SLACK * committed["moved_over_must"])


def test_the_committed_grid_has_cases_that_compiled_and_are_within_their_generations_vmem():
    grid = json.loads((ROOT / "docs" / "tpu_grid.json").read_text())
    vmem = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "v7x": 64}
    for name, row in grid.items():
        assert row["vmem_kib"] < vmem[name.split()[0]] << 10, name
        if name.endswith("decode"):
            assert row["temporaries"] < 64 << 10, name
