"""From a StepPlan to the step's input: one flat int32 array, so that a step is one small transfer to the device.

`StepShape` is a bucket: every step is padded to one of a few shapes, each compiled ahead of time. Page tables stay on
the device: the input only says which page a row got since the step before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from engine.request import Request
from engine.scheduler import Row, StepPlan
from engine.slots import is_plain, request_flags

# A request's constants, by slot: int32, floats as their bits.
SLOT_FIELDS = (
    "prompt_len", "top_k", "seed_high", "seed_low", "flags",
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip
FLOAT_FIELDS = frozenset(SLOT_FIELDS[5:])
MOST_SPECULATING_ROWS = 64  # beyond, a step has no time to spare for drafts
TABLE_ROWS = 8  # rows of page tables in one launch of their own; more take several


class StepShape(NamedTuple):
    """Rows and tokens (S and T of a RaggedBatch) that one executable is made for.

    `plain`: no row wants logprobs or edited logits (`slots.is_plain`), and the step leaves both out.
    `drafts`: how many a row may have, in a step that verifies drafts and in which each row has one token besides.
    `follows`: the device knows better than the host how long sequences are, as wherever there are drafts in flight.
    """

    rows: int
    tokens: int
    plain: bool = False
    drafts: int = 0
    follows: bool = False

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether the step computes them for prompts that ask: mixed steps do."""
        return not self.plain and not self.drafts and self.tokens > self.rows


def step_shapes(max_num_seqs: int, max_num_batched_tokens: int) -> list[StepShape]:
    """-> every bucket: decodes only (rows == tokens), and mixed steps for few rows and for all."""
    decode = [StepShape(n, n) for n in _powers(1, max_num_seqs)]
    most = max(max_num_batched_tokens, max_num_seqs + 1)  # a mixed step has more tokens than rows
    sizes = sorted({min(16, most), *_powers(min(64, most), most)})
    few = min(8, max_num_seqs)
    mixed = [StepShape(rows, n) for rows in sorted({few, max_num_seqs}) for n in sizes if n > rows]
    return decode + mixed


def gpu_step_shapes(max_num_seqs: int, max_num_batched_tokens: int, one_row: bool = False) -> list[StepShape]:
    """-> every bucket for a GPU: plain ones close to each other, and some of every kind for whatever is not plain.

    The host reads the condition of a `lax.cond` on a GPU, so that a step with one waits for it: plain steps have none.
    Decodes are 8 rows at least, as XLA makes poor work of products with one; `one_row`: but for a single one, whose
    products are not XLA's. Below 256 tokens a step's time is that of its weights, and padding costs little.
    """
    most = max(max_num_batched_tokens, max_num_seqs + 1)
    few = min(8, max_num_seqs)
    rows = sorted({few, *(n for n in (16, 32, *range(64, max_num_seqs, 64)) if few < n < max_num_seqs), max_num_seqs})
    sizes = _powers(min(256, most), most)
    between = [n + n // 2 for n in sizes if n >= 256 and n + n // 2 < most]
    plain = [StepShape(n, n, True) for n in ([1] if one_row else []) + rows]
    plain += [StepShape(few, n, True) for n in sorted({min(64, most), min(256, most)}) if n > few]
    plain += [StepShape(max_num_seqs, n, True) for n in sorted({*sizes, *between}) if n > max_num_seqs]
    full = [StepShape(n, n) for n in sorted({few, min(64, max_num_seqs), max_num_seqs})]
    full += [StepShape(max_num_seqs, n) for n in sorted({sizes[-1], *sizes[-3::-2]}) if n > max_num_seqs]
    return list(dict.fromkeys(plain + full))


def speculative_shapes(shapes: Sequence[StepShape], drafts: int, max_num_batched_tokens: int) -> list[StepShape]:
    """-> the buckets of an engine that speculates: `shapes`, and for its decodes up to 64 rows some with drafts.

    Each of those once with all drafts for all rows, and once with room for those of a few.
    """
    found = [shape._replace(follows=True) for shape in shapes]
    for shape in found[:]:
        if shape.rows == shape.tokens <= MOST_SPECULATING_ROWS:
            for room in (max(drafts, shape.rows * drafts // 4), shape.rows * drafts):
                if shape.rows + room <= max(max_num_batched_tokens, 1 + drafts):
                    found.append(shape._replace(tokens=shape.rows + room, drafts=drafts))
    return list(dict.fromkeys(found))


def _powers(low: int, high: int) -> list[int]:
    """-> low, 2 low, 4 low ... and high."""
    return [*itertools.takewhile(lambda n: n < high, (low << i for i in itertools.count())), high]


def choose_shape(shapes: Sequence[StepShape], plan: StepPlan, plain: bool = False) -> StepShape:
    """-> the smallest bucket that the plan fits: fewest tokens, then fewest rows. `plain`: whether all its rows are."""
    rows, tokens = len(plan.rows), plan.num_tokens + sum(row.drafts for row in plan.rows)
    decodes = plan.num_tokens == rows and not any(map(_wants_prompt_logprobs, plan.rows))
    fits = lambda s: s.rows >= rows and s.tokens >= tokens and (decodes or s.tokens > s.rows)
    fitting = [s for s in shapes if fits(s) and (plain or not s.plain) and (s.drafts > 0) == plan.speculates]
    return min(fitting, key=lambda s: (s.tokens, s.rows, not s.plain))


@cache
def layout(shape: StepShape) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """-> where each part of the flat input lies, and its shape."""
    S, T, K = shape.rows, shape.tokens, shape.drafts
    every = ("slots", "row_flags", "new_page_at", "new_page", *(("limits",) if shape.follows else ()))
    constants = {"cu_q_lens": (S + 1,), "constants": (len(SLOT_FIELDS), S), **dict.fromkeys(every, (S,))}
    asked = ("next_tokens",) if shape.has_prompt_logprobs else ()
    sizes: dict[str, tuple[int, ...]] = {
        "num_rows": (), "num_decodes": (), "wants_prompt_logprobs": (),
        **dict.fromkeys(("tokens", "positions", "token_slots", *asked), (T,)),
        **dict.fromkeys(("kv_lens", "sample_at", "sample_positions"), (S,)), **constants,
    }  # fmt: skip
    if shape.drafts:
        sizes = {"row_of": (T,), "given": (S, K), "num_given": (S,), **constants}
    ends = np.cumsum([int(np.prod(size)) for size in sizes.values()]).tolist()
    starts = [0, *ends]
    return {name: (slice(start, end), sizes[name]) for name, start, end in zip(sizes, starts, ends, strict=False)}


def unpack(flat: Any, shape: StepShape) -> dict[str, Any]:
    """-> the parts of a flat input (numpy: views; jax: slices), all int32."""
    return {name: flat[where].reshape(size) for name, (where, size) in layout(shape).items()}


def flat_size(shape: StepShape) -> int:
    return max(where.stop for where, _ in layout(shape).values())


def _wants_prompt_logprobs(row: Row) -> bool:
    request = row.request
    return request.params.prompt_logprobs is not None and row.start < request.num_prompt_tokens - 1


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

    def __init__(self, num_slots: int, pages: int):
        self.num_slots, self.pages = num_slots, pages
        self.num_pages = [0] * num_slots  # that the device's table has of each slot
        self.constants = np.zeros((num_slots, len(SLOT_FIELDS)), np.int32)
        self.plain = [True] * num_slots

    def admit(self, plan: StepPlan) -> bool:
        """Take in the plan's new requests, before anything else. -> whether all rows of the plan are plain."""
        for request in plan.admitted:
            assert request.slot is not None
            self.constants[request.slot] = slot_constants(request)
            self.num_pages[request.slot] = 0
            self.plain[request.slot] = is_plain(request)
        return all(self.plain[row.slot] for row in plan.rows)

    def table_rows(self, plan: StepPlan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields slots [TABLE_ROWS] and page tables [TABLE_ROWS, pages] to be written before the step: those of rows
        with more than one new page. Where there are fewer, slots are out of range.
        """
        grown = [row for row in plan.rows if len(row.request.pages) > self.num_pages[row.slot] + 1]
        for start in range(0, len(grown), TABLE_ROWS):
            slots = np.full(TABLE_ROWS, self.num_slots, np.int32)
            tables = np.zeros((TABLE_ROWS, self.pages), np.int32)
            for i, row in enumerate(grown[start : start + TABLE_ROWS]):
                slots[i], self.num_pages[row.slot] = row.slot, len(row.request.pages)
                tables[i, : len(row.request.pages)] = row.request.pages
            yield slots, tables

    def build(self, plan: StepPlan, shape: StepShape) -> np.ndarray:
        """-> the flat input [flat_size(shape)] int32 of a plan whose table rows are written, padded to the bucket."""
        flat = np.zeros(flat_size(shape), np.int32)
        parts = unpack(flat, shape)
        count = len(plan.rows)
        fields = [(row.slot, row.start, row.count + row.drafts, row.samples, row.limit) for row in plan.rows]
        slots, starts, counts, samples, limits = np.array(fields, np.int32).reshape(-1, 5).T

        ends = np.cumsum(counts, dtype=np.int32)
        total = ends[-1]
        parts["cu_q_lens"][1 : count + 1] = ends
        parts["cu_q_lens"][count + 1 :] = total
        parts["slots"][:] = self.num_slots  # padding writes nowhere
        parts["slots"][:count] = slots
        parts["constants"][:, :count] = self.constants[slots].T
        parts["row_flags"][:count] = parts["constants"][SLOT_FIELDS.index("flags"), :count] * samples
        if shape.follows:
            parts["limits"][:count] = limits
        self._grow_tables(plan, parts)

        row_of = np.repeat(np.arange(count), counts)
        if shape.drafts:
            parts["row_of"][:] = shape.rows  # none
            parts["row_of"][:total] = row_of
            self._give_drafts(plan, parts)
            return flat
        flat[:2] = count, np.count_nonzero(counts == 1)
        parts["kv_lens"][:count] = parts["sample_positions"][:count] = starts + counts
        parts["sample_at"][:count] = ends - 1
        parts["token_slots"][:] = self.num_slots
        parts["token_slots"][:total] = slots[row_of]
        parts["positions"][:total] = np.arange(total, dtype=np.int32) - (ends - counts - starts)[row_of]
        parts["tokens"][:total] = self._tokens(plan)
        if shape.has_prompt_logprobs:
            self._fill_prompt_logprobs(parts, plan)
        return flat

    def _grow_tables(self, plan: StepPlan, parts: dict[str, Any]) -> None:
        """Name the page that a row has got since the step before."""
        parts["new_page_at"][:] = self.pages  # beyond the table: none
        for i, row in enumerate(plan.rows):
            known, pages = self.num_pages[row.slot], row.request.pages
            if len(pages) > known:
                parts["new_page_at"][i], parts["new_page"][i] = known, pages[known]
                self.num_pages[row.slot] = known + 1

    def _give_drafts(self, plan: StepPlan, parts: dict[str, Any]) -> None:
        """Write the drafts that the host has made."""
        for i, row in enumerate(plan.rows):
            parts["given"][i, : len(row.given)] = row.given
            parts["num_given"][i] = len(row.given)

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
            if _wants_prompt_logprobs(row):
                end = min(row.start + row.count, request.num_prompt_tokens - 1)
                parts["next_tokens"][at : at + end - row.start] = request.token_ids[row.start + 1 : end + 1]
                found = True
            at += row.count
        parts["wants_prompt_logprobs"][...] = found
