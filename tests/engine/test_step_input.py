"""Buckets, and the flat input that a plan becomes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from engine.scheduler import Row, StepPlan
from engine.step_input import (
    SLOT_FIELDS,
    TABLE_ROWS,
    BatchBuilder,
    StepShape,
    choose_shape,
    gpu_step_shapes,
    step_shapes,
    unpack,
)
from tests.engine.fakes import make_request


def _build(builder: BatchBuilder, plan: StepPlan, shape: StepShape, table: np.ndarray | None = None) -> np.ndarray:
    """-> the flat input; `table` [slots, pages] becomes what the device's would after the step."""
    builder.admit(plan)
    written = list(builder.table_rows(plan))
    flat = builder.build(plan, shape)
    if table is not None:
        part = unpack(flat, shape)
        for slots, rows in written:
            table[slots[slots < len(table)]] = rows[slots < len(table)]
        there = (part["slots"] < len(table)) & (part["new_page_at"] < table.shape[1])
        table[part["slots"][there], part["new_page_at"][there]] = part["new_page"][there]
    return flat


def _plan(*rows: tuple[list[int], int, int, list[int]]) -> StepPlan:
    """Rows are (known tokens, start, count, pages); slots count down from 5."""
    plan = StepPlan()
    for i, (tokens, start, count, pages) in enumerate(rows):
        request = make_request(tokens, 4)
        request.pages, request.slot = pages, 5 - i
        plan.rows.append(Row(request, 5 - i, start, count, samples=start + count >= len(tokens)))
        plan.admitted.append(request)
        plan.num_tokens += count
    return plan


@pytest.mark.parametrize("seqs", [1, 2, 3, 8, 32, 100])
@pytest.mark.parametrize("budget", [1, 4, 16, 100, 512])
@pytest.mark.parametrize("buckets", [step_shapes, gpu_step_shapes, partial(gpu_step_shapes, one_row=True)])
@pytest.mark.parametrize("plain", [False, True])
def test_every_possible_plan_has_a_bucket(plain: bool, buckets, seqs: int, budget: int):
    if budget < seqs:
        return
    shapes, request = buckets(seqs, budget), make_request([1], 1)
    assert len(set(shapes)) == len(shapes)
    for rows in range(1, seqs + 1):
        for tokens in range(rows, budget + 1):
            plan = StepPlan([Row(request, 0, 0, 1, False)] * rows, num_tokens=tokens)
            shape = choose_shape(shapes, plan, plain)
            assert not shape.plain or plain
            assert shape.plain == plain or buckets is step_shapes
            assert shape.rows >= rows and shape.tokens >= tokens
            assert tokens == rows or shape.tokens > shape.rows, "a chunk needs a mixed step"


@pytest.mark.parametrize("wanted", [None, 3])
def test_prompt_logprobs_of_one_token_need_a_step_that_computes_them(wanted: int | None):
    request = make_request([1, 2], 1)
    request.params = replace(request.params, prompt_logprobs=wanted)
    shape = choose_shape(gpu_step_shapes(8, 64), StepPlan([Row(request, 0, 0, 1, False)], num_tokens=1))
    assert shape.has_prompt_logprobs == (wanted is not None)


def test_a_plan_becomes_ragged_arrays():
    shape = StepShape(4, 8)
    plan = _plan(([7, 8, 9], 2, 1, [11]), ([1, 2, 3, 4, 5, 6], 1, 4, [21, 22]))
    flat = _build(BatchBuilder(num_slots=6, pages=3), plan, shape)
    part = unpack(flat, shape)
    assert (part["num_rows"], part["num_decodes"]) == (2, 1)
    assert part["tokens"].tolist() == [9, 2, 3, 4, 5, 0, 0, 0]
    assert part["positions"].tolist() == [2, 1, 2, 3, 4, 0, 0, 0]
    assert part["token_slots"].tolist() == [5, 4, 4, 4, 4, 6, 6, 6], "padding belongs to no slot"
    assert part["cu_q_lens"].tolist() == [0, 1, 5, 5, 5]
    assert part["kv_lens"].tolist() == [3, 5, 0, 0]
    assert part["sample_at"].tolist() == [0, 4, 0, 0]
    assert part["slots"].tolist() == [5, 4, 6, 6], "padding rows write to no slot"
    assert (part["row_flags"] != 0).tolist() == [True, False, False, False], "only a whole sequence samples"
    temperature = part["constants"][SLOT_FIELDS.index("temperature")]
    assert temperature.view(np.float32).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_plan_is_plain_until_a_row_has_its_logits_edited():
    builder = BatchBuilder(num_slots=6, pages=3)
    first, second = _plan(([7, 8], 0, 2, [11])), _plan(([7, 8], 0, 2, [11]), ([7, 8], 0, 2, [12]))
    assert builder.admit(first)
    second.admitted[1].params = second.admitted[1].params.replace(presence_penalty=1.0)
    assert not builder.admit(second)
    assert builder.admit(first), "the slot's next request is judged anew"


def test_a_token_that_is_still_being_sampled_is_named_by_its_slot():
    shape = StepShape(1, 1)
    flat = _build(BatchBuilder(num_slots=6, pages=3), _plan(([7, 8, 9], 3, 1, [11])), shape)
    assert unpack(flat, shape)["tokens"].tolist() == [-1 - 5]


def test_page_tables_follow_their_requests():
    builder, table = BatchBuilder(num_slots=6, pages=3), np.full((6, 3), 99)
    rows = ([1] * 12, 0, 8, [11, 12]), ([1] * 6, 0, 3, [21])
    plan = _plan(*rows)
    _build(builder, plan, StepShape(2, 16), table)
    assert table[5].tolist() == [11, 12, 0], "several pages at once: the whole row"
    assert table[4].tolist() == [21, 99, 99], "one page: it alone"
    plan.admitted, plan.rows[0].request.pages, plan.rows[1].request.pages = [], [11, 12, 13], [21, 22]
    assert not list(builder.table_rows(plan)), "a row grows by one page within the step"
    _build(builder, plan, StepShape(2, 16), table)
    assert table[5].tolist() == [11, 12, 13] and table[4].tolist()[:2] == [21, 22]


def test_a_slot_that_is_taken_again_forgets_its_pages():
    builder, shape, table = BatchBuilder(num_slots=6, pages=3), StepShape(1, 16), np.zeros((6, 3), int)
    _build(builder, _plan(([1] * 12, 0, 12, [11, 12, 13])), shape, table)
    _build(builder, _plan(([1] * 3, 0, 3, [21])), shape, table)
    assert table[5].tolist()[0] == 21


def test_more_admissions_than_one_launch_writes_take_several():
    plan = StepPlan()
    for slot in range(TABLE_ROWS + 1):
        request = make_request([1] * 8, 4)
        request.pages, request.slot = [slot + 1, slot + 50], slot
        plan.rows.append(Row(request, slot, 0, 8, samples=True))
        plan.admitted.append(request)
        plan.num_tokens += 8
    builder, table = BatchBuilder(num_slots=20, pages=3), np.zeros((20, 3), int)
    _build(builder, plan, StepShape(20, 128), table)
    assert table[: TABLE_ROWS + 1].tolist() == [[slot + 1, slot + 50, 0] for slot in range(TABLE_ROWS + 1)]
