"""What devices exchange in a compiled step: what the algorithm needs and nothing else, and how long a stage is idle."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.layout import has_link
from tests.engine.processes import run_module

LAYERS, STAGES = 2, 4


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What a step of two devices that share LAYERS exchanges, and one of STAGES with a layer each; then two steps of
    two devices with a link between them."""
    cases = [f"compiled,{LAYERS},8,2x1", f"compiled,{STAGES},64,1x{STAGES}"]
    cases += [f"linked,{LAYERS},8,2x1", f"linked,{LAYERS},128,2x1"]
    return run_module("tests.engine.collectives_program", *cases)


def exchanged(found: dict[str, Any]) -> dict[tuple[str, str], int]:
    """-> how often each kind of collective is in each part of the step."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind, _, scope, count in found["collectives"]:
        counts[kind, scope] += count
    return counts


def test_devices_that_share_layers_sum_twice_a_layer_and_never_within_attention(compiled):
    assert exchanged(compiled[0]) == {
        ("all-reduce", "embed"): 1,
        ("all-reduce", "attention"): LAYERS,  # behind it: attention itself is "attend"
        ("all-reduce", "mlp"): LAYERS,
        ("all-to-all", "sample"): 1,  # logits change hands
        ("all-gather", "sample"): 1,  # and tokens
    }


def test_stages_hand_each_micro_batch_on_once_and_are_idle_in_three_of_eleven_turns(compiled):
    found = compiled[1]
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


def test_devices_with_a_link_sum_through_it_but_not_while_they_compute_another_half(compiled):
    assert compiled[2] == {"kernels": 1 + 2 * LAYERS, "psums": 0}
    assert compiled[3] == {"kernels": 0, "psums": 1 + 2 * 2 * LAYERS}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"platform": "tpu"}, False),
        ({"compute_capability": "8.0"}, False),
        ({"compute_capability": "10.0"}, True),
        ({"core_count": 78}, False),
        ({"nvlinks": 0}, False),
        ({"model": 1}, False),
        ({"model": 4}, False),
        ({"stage": 2}, False),
        ({"processes": 2}, False),
    ],
)
def test_gpus_of_one_process_with_nvlinks_have_a_link(monkeypatch, change, expected):
    given: dict[str, Any] = dict(platform="gpu", nvlinks=18, model=2, stage=1, processes=1)
    given |= dict(compute_capability="9.0", core_count=132) | change
    devices = [
        SimpleNamespace(
            platform=given["platform"],
            compute_capability=given["compute_capability"],
            core_count=given["core_count"],
            process_index=i % given["processes"],
        )
        for i in range(16)
    ]
    monkeypatch.setattr("sharding.topology.active_nvlinks", lambda _: given["nvlinks"])
    size, shape = given["stage"] * given["model"], {"stage": given["stage"], "model": given["model"]}
    mesh: Any = SimpleNamespace(devices=np.array(devices, object), shape=shape, size=size)
    assert has_link(mesh) == expected
