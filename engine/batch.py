"""From a StepPlan to the step's input: one flat int32 array, so that a step is one small transfer to the device.

`StepShape` is a bucket: every step is padded to one of a few shapes, each compiled ahead of time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.request import Request
from engine.sampler import is_plain, request_flags
from engine.scheduler import StepPlan

# A request's constants, by slot: int32, floats as their bits.
SLOT_FIELDS = (
    "prompt_len", "top_k", "seed_high", "seed_low", "flags",
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip
FLOAT_FIELDS = frozenset(SLOT_FIELDS[5:])


class StepShape(NamedTuple):
    """Rows, tokens and pages a row (S, T, P of a RaggedBatch) that one executable is made for.

    `plain`: no row asks for more of the sampler than a temperature (`sampler.is_plain`), and the rest is left out.
    """

    rows: int
    tokens: int
    pages: int
    plain: bool = False


def step_shapes(max_num_seqs: int, max_num_batched_tokens: int, pages: int) -> list[StepShape]:
    """-> every bucket: decodes only (rows == tokens), and mixed steps for few rows and for all."""
    decode = [StepShape(n, n, pages) for n in _powers(1, max_num_seqs)]
    most = max(max_num_batched_tokens, max_num_seqs + 1)  # a mixed step has more tokens than rows
    sizes = sorted({min(16, most), *_powers(min(64, most), most)})
    few = min(8, max_num_seqs)
    mixed = [StepShape(rows, n, pages) for rows in sorted({few, max_num_seqs}) for n in sizes if n > rows]
    return decode + mixed


def gpu_step_shapes(max_num_seqs: int, max_num_batched_tokens: int, pages: int) -> list[StepShape]:
    """-> every bucket for a GPU: plain ones close to each other, and some of every kind for whatever is not plain.

    The host reads the condition of a `lax.cond` on a GPU, so that a step with one waits for it: plain steps have none.
    Decodes are 8 rows at least: XLA makes poor work of products with one row.
    """
    most = max(max_num_batched_tokens, max_num_seqs + 1)
    few = min(8, max_num_seqs)
    rows = [few]
    while rows[-1] < max_num_seqs:
        step = min(max(1 << (rows[-1].bit_length() - 2), 8), 32)
        rows.append(min(rows[-1] + step, max_num_seqs))
    sizes = _powers(min(64, most), most)
    between = [n + n // 2 for n in sizes if n >= 512 and n + n // 2 < most]
    plain = [StepShape(n, n, pages, True) for n in rows]
    plain += [
        StepShape(few, n, pages, True) for n in sorted({min(16, most), *sizes}) if n > few and (n <= 512 or n == most)
    ]
    plain += [StepShape(max_num_seqs, n, pages, True) for n in sorted({*sizes, *between}) if n > max_num_seqs > few]
    full = [StepShape(n, n, pages) for n in sorted({few, min(64, max_num_seqs), max_num_seqs})]
    full += [StepShape(max_num_seqs, n, pages) for n in sorted({sizes[-1], *sizes[-3::-2]}) if n > max_num_seqs]
    return plain + full


def _powers(low: int, high: int) -> list[int]:
    """-> low, 2 low, 4 low ... and high."""
    return [*itertools.takewhile(lambda n: n < high, (low << i for i in itertools.count())), high]


def choose_shape(shapes: Sequence[StepShape], plan: StepPlan, plain: bool = False) -> StepShape:
    """-> the smallest bucket that the plan fits: fewest tokens, then fewest rows. `plain`: whether all its rows are."""
    rows = len(plan.rows)
    decodes = plan.num_tokens == rows
    fits = lambda s: s.rows >= rows and s.tokens >= plan.num_tokens and (decodes or s.tokens > s.rows)
    fitting = [s for s in shapes if fits(s) and (plain or not s.plain)]
    return min(fitting, key=lambda s: (s.tokens, s.rows, not s.plain))


def layout(shape: StepShape) -> dict[str, tuple[int, ...]]:
    """-> name and shape of each part of the flat input, in order."""
    S, T, P = shape[:3]
    per_row = ("kv_lens", "sample_at", "slots", "row_flags", "sample_positions")
    return {
        "num_rows": (), "num_decodes": (), "wants_prompt_logprobs": (),
        **dict.fromkeys(("tokens", "positions", "write_page", "write_offset", "next_tokens"), (T,)),
        "cu_q_lens": (S + 1,), "page_table": (S, P),
        **dict.fromkeys(per_row, (S,)), **dict.fromkeys(SLOT_FIELDS, (S,)),
    }  # fmt: skip


def unpack(flat: Any, shape: StepShape) -> dict[str, Any]:
    """-> the parts of a flat input (numpy: views; jax: slices), all int32."""
    parts, start = {}, 0
    for name, size in layout(shape).items():
        count = int(np.prod(size, dtype=np.int64))
        parts[name] = flat[start : start + count].reshape(size)
        start += count
    return parts


def flat_size(shape: StepShape) -> int:
    return sum(int(np.prod(size, dtype=np.int64)) for size in layout(shape).values())


def slot_constants(request: Request) -> list[int]:
    """-> the request's values of SLOT_FIELDS as int32."""
    params = request.params
    floats = (
        params.temperature, params.top_p, params.min_p,
        params.repetition_penalty, params.frequency_penalty, params.presence_penalty,
    )  # fmt: skip
    seed = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32).view(np.int32).tolist()
    bits = np.array(floats, np.float32).view(np.int32).tolist()
    return [request.num_prompt_tokens, params.top_k, *seed, request_flags(request), *bits]


class BatchBuilder:
    """Keeps what the device must know of each slot, so that building a step copies rows instead of making them."""

    def __init__(self, num_slots: int, pages: int, page_size: int):
        self.page_size = page_size
        self.page_table = np.zeros((num_slots, pages), np.int32)
        self.num_pages = [0] * num_slots
        self.constants = np.zeros((num_slots, len(SLOT_FIELDS)), np.int32)
        self.plain = [True] * num_slots

    def admit(self, plan: StepPlan) -> bool:
        """Take in the plan's new requests, before `build`. -> whether all rows of the plan are plain."""
        for request in plan.admitted:
            assert request.slot is not None
            self.constants[request.slot] = slot_constants(request)
            self.num_pages[request.slot] = 0
            self.plain[request.slot] = is_plain(request)
        return all(self.plain[row.slot] for row in plan.rows)

    def build(self, plan: StepPlan, shape: StepShape) -> np.ndarray:
        """-> the flat input [flat_size(shape)] int32 of a plan whose requests are admitted, padded to the bucket."""
        flat = np.zeros(flat_size(shape), np.int32)
        parts = unpack(flat, shape)
        count = len(plan.rows)
        for row in plan.rows:
            self._take_pages(row.slot, row.request.pages)
        slots = np.fromiter((row.slot for row in plan.rows), np.int32, count)
        starts = np.fromiter((row.start for row in plan.rows), np.int32, count)
        counts = np.fromiter((row.count for row in plan.rows), np.int32, count)
        samples = np.fromiter((row.samples for row in plan.rows), np.bool_, count)

        flat[:2] = count, np.count_nonzero(counts == 1)
        ends = np.cumsum(counts, dtype=np.int32)
        parts["cu_q_lens"][1 : count + 1] = ends
        parts["cu_q_lens"][count + 1 :] = plan.num_tokens
        parts["kv_lens"][:count] = starts + counts
        parts["page_table"][:count] = self.page_table[slots]
        parts["sample_at"][:count] = ends - 1
        parts["slots"][:] = len(self.page_table)  # padding rows write nowhere
        parts["slots"][:count] = slots
        parts["sample_positions"][:count] = starts + counts
        for i, name in enumerate(SLOT_FIELDS):
            parts[name][:count] = self.constants[slots, i]
        parts["row_flags"][:count] = np.where(samples, parts["flags"][:count], 0)

        row_of = np.repeat(np.arange(count), counts)
        positions = np.arange(plan.num_tokens, dtype=np.int32) - (ends - counts - starts)[row_of]
        parts["positions"][: plan.num_tokens] = positions
        parts["write_page"][: plan.num_tokens] = self.page_table[slots[row_of], positions // self.page_size]
        parts["write_offset"][: plan.num_tokens] = positions % self.page_size
        parts["tokens"][: plan.num_tokens] = self._tokens(plan)
        if any(row.request.params.prompt_logprobs is not None for row in plan.rows):
            self._fill_prompt_logprobs(parts, plan)
        return flat

    def _take_pages(self, slot: int, pages: list[int]) -> None:
        known = self.num_pages[slot]
        if len(pages) > known:
            self.page_table[slot, known : len(pages)] = pages[known:]
            self.num_pages[slot] = len(pages)

    def _tokens(self, plan: StepPlan) -> list[int]:
        """-> token ids; one that is still being sampled is -1 - slot: the step reads it from its own state."""
        tokens = []
        for row in plan.rows:
            known = row.request.token_ids
            if row.count == 1:
                tokens.append(known[row.start] if row.start < len(known) else -1 - row.slot)
            else:
                tokens += known[row.start : row.start + row.count]
        return tokens

    def _fill_prompt_logprobs(self, parts: dict[str, Any], plan: StepPlan) -> None:
        """Name the token after each prompt token of the rows that want its probability."""
        at, found = 0, False
        for row in plan.rows:
            request = row.request
            if request.params.prompt_logprobs is not None and row.start < request.num_prompt_tokens - 1:
                end = min(row.start + row.count, request.num_prompt_tokens - 1)
                parts["next_tokens"][at : at + end - row.start] = request.token_ids[row.start + 1 : end + 1]
                found = True
            at += row.count
        parts["wants_prompt_logprobs"][...] = found
