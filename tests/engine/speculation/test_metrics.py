"""What /metrics tells of speculation."""

from __future__ import annotations

from engine.core import Stats
from engine.server.metrics import Metrics
from engine.speculation.speculator import SpeculationStats


def exposed(speculation: SpeculationStats | None) -> str:
    metrics = Metrics("m")
    metrics.observe_step(Stats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, speculation), stepped=False)
    return metrics.expose().decode()


def test_drafts_are_exposed_under_the_usual_names():
    lines = exposed(SpeculationStats(10, 30, 12, [7, 4, 1])).splitlines()
    for name, value in (("num_drafts", 10.0), ("num_draft_tokens", 30.0), ("num_accepted_tokens", 12.0)):
        assert f'quire:spec_decode_{name}_total{{model_name="m"}} {value}' in lines
    place = 'quire:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="1"} 4.0'
    assert place in lines


def test_an_engine_that_does_not_speculate_says_nothing_of_it():
    assert "spec_decode" not in exposed(None)
