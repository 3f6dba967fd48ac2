"""Attention of rows with more than one token: blocks of queries against blocks of pages (FlashAttention-2, Dao 2023).

The work on one block of pages is cut into units, each a KV head and some of its query heads. Three units are worked on
at a time: the MXU scores one and weighs the values of another, while the scores of the third become weights. What
passes from stage to stage goes through VMEM, since there are not registers enough for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas.call import LOG2_E, LOWEST, Arrays, Call, first_lane, fold, pad_lanes, widen
from kernels.pallas.layout import EDGE, LANES
from kernels.pallas.stream import Stream

MXU_TOKENS = 256  # what the widest MXU adds up by itself


class Scratch(NamedTuple):
    """N: queries of a block; U: units of a block of pages; M: rows of a unit, query head after query head."""

    incoming: Any  # VMEM [heads, group, N, D]: queries, as they come
    outgoing: Any  # VMEM [heads, group, N, value_dim]
    edge: Any  # VMEM [heads, group, EDGE, value_dim]: results of the rows before, in tokens that are copied together
    queries: Any  # VMEM [U, M, lanes] in the compute dtype
    maximum: Any  # VMEM [U, M, 128] f32, each row one number
    total: Any  # VMEM [U, M, 128] f32, sums by lane
    value: Any  # VMEM [U, M, lanes] f32
    scores: Any  # VMEM [2, M, block] f32: of two units
    weights: Any  # VMEM [2, M, block] in the compute dtype
    keeps: Any  # VMEM [2, M, 128] f32: what to multiply earlier sums with
    value_keeps: Any  # VMEM [2, M, 128] f32: the same, for weighted values, which come later
    fetched: Any  # DMA semaphore
    sent: Any  # DMA semaphore
    sending: Any  # SMEM [1] i32: copies of results under way


def unit_group(call: Call) -> int:
    """-> query heads of a unit: as many of a KV head's as `blocks.unit_rows` has room for."""
    group = call.spec.group
    room = max(call.blocks.unit_rows // block_tokens(call), 1)
    return max(n for n in range(1, group + 1) if group % n == 0 and n <= room)


def block_tokens(call: Call) -> int:
    return min(call.blocks.prefill_q, call.tokens)


def scratch_types(call: Call) -> Scratch:
    spec, layout = call.spec, call.layout
    N, some = block_tokens(call), unit_group(call)
    U, M = layout.heads * spec.group // some, some * N
    number = pltpu.VMEM((U, M, LANES), jnp.float32)
    return Scratch(
        pltpu.VMEM((layout.heads, spec.group, N, spec.head_dim), call.q_dtype),
        pltpu.VMEM((layout.heads, spec.group, N, layout.value_dim), call.q_dtype),
        pltpu.VMEM((layout.heads, spec.group, min(EDGE, call.tokens), layout.value_dim), call.q_dtype),
        pltpu.VMEM((U, M, layout.lanes), call.compute_dtype),
        number,
        number,
        pltpu.VMEM((U, M, layout.lanes), jnp.float32),
        pltpu.VMEM((2, M, call.blocks.prefill_kv), jnp.float32),
        pltpu.VMEM((2, M, call.blocks.prefill_kv), call.compute_dtype),
        pltpu.VMEM((2, M, LANES), jnp.float32),
        pltpu.VMEM((2, M, LANES), jnp.float32),
        pltpu.SemaphoreType.DMA,
        pltpu.SemaphoreType.DMA,
        pltpu.SMEM((1,), jnp.int32),
    )


class Turn(NamedTuple):
    """One block of queries of one row: tokens [start, start + N), of which [low, high) are the turn's own."""

    start: Array
    low: Array
    high: Array
    position: Array  # of token `start` in its sequence; negative if that token belongs to an earlier row


class Pages(NamedTuple):
    """One block of pages."""

    block: Any  # VMEM [channels, block, lanes]
    position: Array  # of the first token in its sequence
    end: Array  # of what the turn reads
    masked: bool  # whether some of it is not for all of the turn's queries


def turns(call: Call, arrays: Arrays, row: Array) -> Array:
    begin, end = arrays.cu_q_lens[row], arrays.cu_q_lens[row + 1]
    return jnp.maximum(pl.cdiv(end - _aligned(begin), block_tokens(call)), 1)


def _aligned(token: Array) -> Array:
    return token // EDGE * EDGE


def find_turn(call: Call, arrays: Arrays, row: Array, turn: Array | int) -> Turn:
    N = block_tokens(call)
    begin, end = arrays.cu_q_lens[row], arrays.cu_q_lens[row + 1]
    first = _aligned(begin) + turn * N
    start = jnp.minimum(first, call.tokens - N)
    position = arrays.kv_lens[row] - end + start
    return Turn(start, jnp.maximum(begin, first), jnp.minimum(end, first + N), position)


def span(call: Call, arrays: Arrays, row: Array, turn: Array) -> tuple[Array, Array]:
    """-> where the pages that a turn reads start, and the end of its context."""
    t = find_turn(call, arrays, row, turn)
    end = t.position + t.high - t.start
    if call.spec.window is None:
        return jnp.int32(0), end
    first = jnp.maximum(t.position + t.low - t.start - call.spec.window + 1, 0)
    return first // call.page_size * call.page_size, end


def prefill(call: Call, arrays: Arrays, stream: Stream, s: Scratch) -> None:
    """Attend from the rows of the stream."""

    def fetch(row: Array, turn: Array | int) -> Any:
        start = find_turn(call, arrays, row, turn).start
        return pltpu.make_async_copy(_tokens(arrays.q, start, s.incoming.shape[2], call), s.incoming, s.fetched)

    s.sending[0] = 0

    @pl.when(stream.first_row < stream.end_row)
    def _() -> None:
        fetch(stream.first_row, 0).start()
        stream.begin()

    @pl.loop(stream.first_row, stream.end_row)
    def _(row: Array) -> None:
        count = turns(call, arrays, row)

        @pl.loop(0, count)
        def _(turn: Array) -> None:
            fetch(row, turn).wait()
            _take_queries(call, arrays, s)
            is_last = turn + 1 >= count
            next_row = jnp.where(is_last, row + 1, row)

            @pl.when(next_row < stream.end_row)
            def _() -> None:
                fetch(next_row, jnp.where(is_last, 0, turn + 1)).start()

            t = find_turn(call, arrays, row, turn)
            _attend(call, stream, s, t, *span(call, arrays, row, turn))
            _give_results(call, arrays, s, t)

    _wait_sent(call, arrays, s)


def _tokens(ref: Any, start: Any, count: int, call: Call) -> Any:
    """-> ref [heads, group, T, D] at tokens [start, start + count)."""
    if count == call.tokens:
        return ref
    return ref.at[:, :, pl.ds(pl.multiple_of(start, EDGE), count)]


def _units(call: Call) -> list[tuple[int, int, int, int]]:
    """-> for each query head: KV head, place in its group, unit, and place in the unit."""
    group, some = call.spec.group, unit_group(call)
    return [
        (head, g, (head * group + g) // some, (head * group + g) % some)
        for head in range(call.layout.heads)
        for g in range(group)
    ]


def _take_queries(call: Call, arrays: Arrays, s: Scratch) -> None:
    """Bring queries into the form in which they are multiplied, and start their sums."""
    N, lanes = s.incoming.shape[2], call.layout.lanes
    for head, g, unit, place in _units(call):
        at = pl.ds(place * N, N)
        q = s.incoming[head, g].astype(jnp.float32) * call.query_factor(arrays.kv_scales, head)
        s.queries[unit, at] = pad_lanes(q, lanes).astype(call.compute_dtype)
        if call.sinks:
            s.maximum[unit, at] = jnp.full((N, LANES), arrays.sinks[head, g] * LOG2_E)
    if call.sinks:
        s.total[...] = first_lane(1.0, s.total.shape)
    else:
        s.maximum[...] = jnp.full(s.maximum.shape, LOWEST, jnp.float32)
        s.total[...] = jnp.zeros(s.total.shape, jnp.float32)
    s.value[...] = jnp.zeros(s.value.shape, jnp.float32)


def _attend(call: Call, stream: Stream, s: Scratch, t: Turn, start: Array, end: Array) -> None:
    """Take in all pages of a turn."""
    units = s.queries.shape[0]
    blocks = stream.blocks(start, end)
    # Blocks that all of the turn's queries see whole come first; the diagonal, or a window's edges, need a mask.
    first_end = t.position + t.low - t.start + 1
    whole = 0 if call.spec.window is not None else jnp.minimum(first_end // stream.block, blocks)

    def block_of_pages(block: Array, *, masked: bool) -> None:
        slot = stream.take(start, end, block, full=not masked)
        pages = Pages(stream.buffer.at[slot], start + block * stream.block, end, masked)
        score = lambda unit, place: _score(call, s, t, pages, unit, place)
        weigh = lambda unit, place: _weigh(s, unit, place)
        add = lambda unit, place: _add(call, s, pages, unit, place)
        score(0, 0)
        if units > 1:
            score(1, 1)
        weigh(0, 0)

        def step(unit: Any, place: int) -> None:
            score(unit + 2, place)
            weigh(unit + 1, 1 - place)
            # The minimum changes nothing but what the compiler knows: not sure that this is neither of the other units,
            # it moves loads not so far ahead that registers run out (v6e: 53 spills, not 145; 1290 bundles, not 1435).
            add(jnp.minimum(unit, units - 1), place)

        @pl.loop(0, max(units - 2, 0) // 2)
        def _(pair: Array) -> None:
            step(2 * pair, 0)
            step(2 * pair + 1, 1)

        if units > 2 and units % 2:
            step(units - 3, 0)
        if units > 1:
            weigh(units - 1, (units - 1) % 2)
            add(units - 2, units % 2)
        add(units - 1, (units - 1) % 2)

    @pl.loop(0, whole)
    def _(block: Array) -> None:
        block_of_pages(block, masked=False)

    @pl.loop(whole, blocks)
    def _(block: Array) -> None:
        block_of_pages(block, masked=True)


def _head(call: Call, unit: Any) -> Any:
    """-> the KV head of a unit."""
    per_head = call.spec.group // unit_group(call)
    return unit if per_head == 1 else jax.lax.div(unit, per_head)


def _score(call: Call, s: Scratch, t: Turn, pages: Pages, unit: Any, place: int) -> None:
    """Scores of a unit into s.scores[place]; moves its maximum."""
    scores = call.scores(s.queries[unit], pages.block[_head(call, unit)].astype(call.compute_dtype))
    if pages.masked:
        M, size = scores.shape
        N = s.incoming.shape[2]
        token = jax.lax.broadcasted_iota(jnp.int32, (M // N, N, size), 1).reshape(M, size)
        ahead = (t.position - pages.position) + token - jax.lax.broadcasted_iota(jnp.int32, (M, size), 1)
        visible = ahead >= 0
        if call.spec.window is not None:
            visible &= ahead < call.spec.window
        scores = jnp.where(visible, scores, -jnp.inf)
    s.scores[place] = scores
    before = s.maximum[unit]
    maximum = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    s.maximum[unit] = maximum
    s.keeps[place] = jnp.exp2(before - maximum)


def _weigh(s: Scratch, unit: Any, place: int) -> None:
    """Weights of a unit into s.weights[place], some rows at a time, and into its total."""
    _, M, size = s.scores.shape
    rows = next(n for n in (64, 32, 16, 8, M) if M % n == 0)
    for i in range(0, M, rows):
        part = pl.ds(i, rows)
        weights = jnp.exp2(s.scores[place, part] - widen(s.maximum[unit, part], size))
        keep = s.keeps[place, part]
        s.total[unit, part] = s.total[unit, part] * keep + fold(weights)
        s.weights[place, part] = weights.astype(s.weights.dtype)
        s.value_keeps[place, part] = keep


def _add(call: Call, s: Scratch, pages: Pages, unit: Any, place: int) -> None:
    """Weighted values of a unit into its sums, as many tokens at a time as the MXU adds up."""
    channel, size = call.layout.value_channel(_head(call, unit)), s.scores.shape[2]
    step = min(MXU_TOKENS, size)
    for i in range(0, size, step):
        part = pl.ds(i, step)
        v = pages.block[channel, part].astype(call.compute_dtype)
        if pages.masked:  # beyond the end memory holds anything, and 0 * NaN is NaN
            token = pages.position + i + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
            v = jnp.where(token < pages.end, v, jnp.zeros_like(v))
        more = call.dot(s.weights[place, :, part], v, (1, 0))
        before = s.value[unit] * widen(s.value_keeps[place], v.shape[1]) if i == 0 else s.value[unit]
        s.value[unit] = before + more


def _give_results(call: Call, arrays: Arrays, s: Scratch, t: Turn) -> None:
    """Send the turn's own results; copies are of EDGE tokens, of which the first may belong to the rows before."""
    N, first_lane_, size = s.incoming.shape[2], call.layout.value_lane, call.layout.value_dim
    unit = min(EDGE, call.tokens)
    ours = jax.lax.rem(t.low, EDGE)  # where our tokens start in the first copy
    first, last = (t.low - t.start) // unit, pl.cdiv(t.high - t.start, unit)
    _wait_sent(call, arrays, s)
    shared = (ours > 0) & (t.low < t.high)

    @pl.when(shared)
    def _() -> None:
        copy = pltpu.make_async_copy(_tokens(arrays.out, t.low - ours, unit, call), s.edge, s.sent)
        copy.start()
        copy.wait()

    for head, g, at, place in _units(call):
        rows = pl.ds(place * N, N)
        total = jnp.sum(s.total[at, rows], axis=1, keepdims=True)
        result = s.value[at, rows] / total
        if call.scaled:
            result = result * arrays.kv_scales[1, head]
        s.outgoing[head, g] = result[:, first_lane_ : first_lane_ + size].astype(call.q_dtype)

    @pl.when(shared)
    def _() -> None:
        at = pl.ds(pl.multiple_of(first * unit, unit), unit)
        theirs = jax.lax.broadcasted_iota(jnp.int32, (unit, size), 0) < ours
        for head in range(call.layout.heads):
            for g in range(call.spec.group):
                before, now = (x.astype(jnp.float32) for x in (s.edge[head, g], s.outgoing[head, g, at]))
                s.outgoing[head, g, at] = jnp.where(theirs, before, now).astype(call.q_dtype)

    @pl.loop(first, last)
    def _(i: Array) -> None:
        _send(call, arrays, s, t.start, i * unit).start()
        s.sending[0] += 1


def _send(call: Call, arrays: Arrays, s: Scratch, start: Any, offset: Any) -> Any:
    unit = min(EDGE, call.tokens)
    here = s.outgoing if unit == s.outgoing.shape[2] else s.outgoing.at[:, :, pl.ds(pl.multiple_of(offset, unit), unit)]
    return pltpu.make_async_copy(here, _tokens(arrays.out, start + offset, unit, call), s.sent)


def _wait_sent(call: Call, arrays: Arrays, s: Scratch) -> None:
    @pl.loop(0, s.sending[0])
    def _(_: Array) -> None:
        _send(call, arrays, s, 0, 0).wait()

    s.sending[0] = 0
