"""What devices exchange in a compiled step: what the algorithm needs and nothing else, and how long a stage is idle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.weights.load import read_config

ROOT = Path(__file__).parents[2]


def compiled(folder: str, tokens: int, mesh: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.collectives_program", folder, str(tokens), mesh], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)[mesh]


def exchanged(found: dict[str, Any]) -> dict[tuple[str, str], int]:
    """-> how often each kind of collective is in each part of the step."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind, _, scope, count in found["collectives"]:
        counts[kind, scope] += count
    return counts


def test_devices_that_share_layers_sum_twice_a_layer_and_never_within_attention():
    layers = len(read_config(ROOT / "tests" / "data" / "tiny" / "llama3").layers)
    found = compiled("llama3", tokens=8, mesh="2x1")
    assert exchanged(found) == {
        ("all-reduce", "embed"): 1,
        ("all-reduce", "attention"): layers,  # behind it: attention itself is "attend"
        ("all-reduce", "mlp"): layers,
        ("all-to-all", "sample"): 1,  # logits change hands
        ("all-gather", "sample"): 1,  # and tokens
    }


def test_stages_hand_each_micro_batch_on_once_and_are_idle_in_three_of_eleven_turns():
    found = compiled("smollm3", tokens=64, mesh="1x4")
    assert exchanged(found) == {
        ("collective-permute", ""): 11,
        ("all-reduce", "embed"): 1,
        ("all-reduce", "sample"): 1,  # what left the last stage, of the rows that sample
        ("all-to-all", "sample"): 1,
        ("all-gather", "sample"): 1,
    }
    assert found["turns"] == 11  # of the compiled loop
    assert found["busy"] == [8, 8, 8, 8]
    assert 1 - 8 / found["turns"] == pytest.approx(0.273, abs=1e-3)
