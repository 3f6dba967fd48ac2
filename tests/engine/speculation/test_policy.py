"""How many drafts are worth their time."""

from __future__ import annotations

import pytest

from engine.speculation.policy import Acceptance, Policy
from engine.speculation.speculator import Repeats
from engine.step_input import StepShape, speculative_shapes, step_shapes

K = 4
SHAPES = speculative_shapes(step_shapes(8, 64), K, 64)


def policy(cost_of_a_token: float, adaptive: bool = True) -> Policy:
    """-> one for a machine whose step takes a second, and so much more for each token beyond the first."""
    seconds = {s: 1 + cost_of_a_token * (s.tokens - 1) for s in SHAPES if s.drafts or s.rows == s.tokens}
    return Policy(SHAPES, seconds, K, adaptive)


def test_free_drafts_are_taken_and_dear_ones_are_not():
    assert policy(0.0).drafts([0.5], False) == [K]
    assert policy(0.9).drafts([0.5], False) is None


def test_a_request_gets_as_many_as_its_acceptance_is_worth():
    counts = policy(0.12).drafts([0.9, 0.9, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0], False)
    assert counts is not None
    assert counts[:2] == [K, K] and counts[3:] == [0] * 5
    assert sum(counts) <= 8


def test_a_hopeless_step_has_none():
    assert policy(0.1).drafts([0.01] * 8, False) is None


def test_all_rows_get_all_drafts_where_nothing_adapts():
    assert policy(9.0, adaptive=False).drafts([0.0] * 8, False) == [K] * 8


def test_more_rows_than_any_shape_with_drafts_has_get_none():
    assert policy(0.0).drafts([0.9] * 9, False) is None


def test_probes_take_a_small_share_of_the_time():
    hopeless = policy(0.5)
    steps = [hopeless.drafts([0.05], False) is not None for _ in range(2000)]
    assert 0 < sum(steps) * 0.5 * K < 0.02 * len(steps)


def test_acceptance_follows_what_happens():
    known = Acceptance(1.0, 2.0)
    for _ in range(20):
        known.observe(0, 4)
    assert known.chance < 0.05
    for _ in range(20):
        known.observe(4, 4)
    assert known.chance > 0.9
    assert known.chance <= 0.98


def test_newcomers_are_thought_to_be_like_the_others():
    learned = policy(0.0)
    before = learned.newcomer().chance
    for _ in range(1000):
        learned.observe(0, 4)
    assert learned.newcomer().chance < 0.1 < before


def test_shapes_with_drafts_stay_within_the_budget_of_tokens():
    shapes = speculative_shapes(step_shapes(32, 64), 8, 64)
    assert all(shape.follows for shape in shapes) and len(set(shapes)) == len(shapes)
    drafting = [shape for shape in shapes if shape.drafts]
    assert drafting and all(shape.tokens <= 64 for shape in drafting)
    assert StepShape(1, 9, drafts=8, follows=True) in drafting


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sequence_that_ends_in_what_it_had_before_is_known(size: int):
    repeats, text, seen = Repeats(size), list(b"abcxabcabyxxabcz"), []
    for length in range(len(text) + 1):
        seen.append(repeats.ends_in_one(text[:length]))
    expected = [
        length >= size and any(text[i : i + size] == text[length - size : length] for i in range(length - size))
        for length in range(len(text) + 1)
    ]
    assert seen == expected
