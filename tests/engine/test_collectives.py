"""What devices exchange in a compiled step: what the algorithm needs and nothing else, and how long a stage is idle."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.engine.processes import run_module

LAYERS, STAGES = 2, 4


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What a step of two devices that share LAYERS exchanges, and one of STAGES with a layer each."""
    cases = [f"{LAYERS},8,2x1", f"{STAGES},64,1x{STAGES}"]
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
