"""Attention of rows with one token: all heads' queries are multiplied with a block of pages as it streams by.

What the MXU holds still are keys and values, which pass through it once either way; the queries of as many KV heads as
it is wide for lie block-diagonally, so that one product scores them all. Running softmax: Milakov & Gimelshein 2018.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas.call import LOG2_E, LOWEST, Arrays, Call, first_lane, fold, widen
from kernels.pallas.layout import LANES, SUBLANES
from kernels.pallas.stream import Stream


class Scratch(NamedTuple):
    """`packs`: sets of KV heads that are scored together; R = heads of a pack * group, W = heads of a pack * lanes."""

    incoming: Any  # VMEM [heads, group, N, D]: N rows' queries, as they come
    outgoing: Any  # VMEM [heads, group, N, value_dim]
    queries: Any  # VMEM [N, packs, R, W] f32: block-diagonal
    results: Any  # VMEM [N, packs, R, W] f32: what is asked for is on the diagonal
    maximum: Any  # VMEM [packs, R, 128] f32, each row one number
    total: Any  # VMEM [packs, R, 128] f32, sums by lane
    value: Any  # VMEM [packs, R, W] f32
    value_scales: Any  # VMEM [packs, R, 128] f32; or None
    first_maximum: Any  # VMEM [packs, R, 128] f32: the sinks; or None
    moved: Any  # DMA semaphores [2]: queries in, results out


class Tokens(NamedTuple):
    """Some tokens of a block of pages."""

    block: Any  # VMEM [channels, block, lanes]
    offset: Any  # of the first, in the block
    size: int
    position: Array | None  # of the first, in the sequence; None if all of them are visible
    end: Array  # of the sequence


def group_size(tokens: int) -> int:
    """-> how many rows' queries are fetched together."""
    return next((n for n in (2 * SUBLANES, SUBLANES) if tokens % n == 0), tokens)


def scratch_types(call: Call) -> Scratch:
    spec, layout = call.spec, call.layout
    pack, rows = call.blocks.pack, group_size(call.tokens)
    packs, R, W = layout.heads // pack, pack * spec.group, pack * layout.lanes
    number = pltpu.VMEM((packs, R, LANES), jnp.float32)
    wide = pltpu.VMEM((rows, packs, R, W), jnp.float32)
    return Scratch(
        pltpu.VMEM((layout.heads, spec.group, rows, spec.head_dim), call.q_dtype),
        pltpu.VMEM((layout.heads, spec.group, rows, layout.value_dim), call.q_dtype),
        wide,
        wide,
        number,
        number,
        pltpu.VMEM((packs, R, W), jnp.float32),
        number if call.scaled else None,
        number if call.sinks else None,
        pltpu.SemaphoreType.DMA((2,)),
    )


def span(call: Call, arrays: Arrays, row: Array) -> tuple[Array, Array]:
    """-> where the pages that a decode reads start, and the end of its context."""
    end = arrays.kv_lens[row]
    if call.spec.window is None:
        return jnp.int32(0), end
    first = jnp.maximum(end - call.spec.window, 0)
    return first // call.page_size * call.page_size, end


def decode(call: Call, arrays: Arrays, stream: Stream, s: Scratch) -> None:
    """Attend from rows [0, decodes); results of other rows of the last group are undefined."""
    N, end_row = s.queries.shape[0], stream.end_row
    groups = pl.cdiv(end_row, N)

    def group_copy(ref: Any, here: Any, group: Array, semaphore: int, *, out: bool) -> Any:
        at = slice(None) if call.tokens == N else pl.ds(pl.multiple_of(group * N, min(N, SUBLANES)), N)
        there = ref.at[:, :, at]
        source, target = (here, there) if out else (there, here)
        return pltpu.make_async_copy(source, target, s.moved.at[semaphore])

    fetch = lambda group: group_copy(arrays.q, s.incoming, group, 0, out=False)
    send = lambda group: group_copy(arrays.out, s.outgoing, group, 1, out=True)
    s.queries[...] = jnp.zeros(s.queries.shape, jnp.float32)
    _spread_options(call, arrays, s)

    @pl.when(end_row > 0)
    def _() -> None:
        fetch(0).start()
        stream.begin()

    @pl.loop(0, groups)
    def _(group: Array) -> None:
        fetch(group).wait()
        _take_queries(call, arrays, s)

        @pl.when(group + 1 < groups)
        def _() -> None:
            fetch(group + 1).start()

        @pl.loop(0, jnp.minimum(end_row - group * N, N))
        def _(i: Array) -> None:
            _row(call, arrays, stream, s, group * N + i, i)

        @pl.when(group > 0)
        def _() -> None:
            send(group).wait()

        _give_results(call, s)
        send(group).start()

    @pl.when(end_row > 0)
    def _() -> None:
        send(0).wait()


def _spread_options(call: Call, arrays: Arrays, s: Scratch) -> None:
    """Scalars of heads into the rows of the packs."""
    pack, group = call.blocks.pack, call.spec.group
    for head in range(call.layout.heads):
        for g in range(group):
            place = head // pack, pl.ds(head % pack * group + g, 1)
            if call.scaled:
                s.value_scales[*place] = jnp.full((1, LANES), arrays.kv_scales[1, head])
            if call.sinks:
                s.first_maximum[*place] = jnp.full((1, LANES), arrays.sinks[head, g])


def _places(call: Call) -> list[tuple[int, int, int, int, int]]:
    """-> for each query head: KV head, place in its group, pack, row in the pack, first lane."""
    pack, group = call.blocks.pack, call.spec.group
    return [
        (head, g, head // pack, head % pack * group + g, head % pack * call.layout.lanes)
        for head in range(call.layout.heads)
        for g in range(group)
    ]


def _take_queries(call: Call, arrays: Arrays, s: Scratch) -> None:
    for head, g, pack, row, lane in _places(call):
        q = s.incoming[head, g].astype(jnp.float32) * call.query_factor(arrays.kv_scales, head)
        s.queries[:, pack, row, pl.ds(lane, call.spec.head_dim)] = q


def _give_results(call: Call, s: Scratch) -> None:
    start, size = call.layout.value_lane, call.layout.value_dim
    for head, g, pack, row, lane in _places(call):
        whole = s.results[:, pack, row, pl.ds(lane, call.layout.lanes)]
        s.outgoing[head, g] = whole[:, start : start + size].astype(call.q_dtype)


def _row(call: Call, arrays: Arrays, stream: Stream, s: Scratch, row: Array, place: Array) -> None:
    """Attend from one row, whose queries are s.queries[place]."""
    start, end = span(call, arrays, row)
    packs = s.value.shape[0]
    queries = [s.queries[place, pack].astype(call.compute_dtype) for pack in range(packs)]
    last = stream.blocks(start, end) - 1

    s.value[...] = jnp.zeros(s.value.shape, jnp.float32)
    if call.sinks:
        s.maximum[...] = s.first_maximum[...] * LOG2_E
        s.total[...] = first_lane(1.0, s.total.shape)
    else:
        s.maximum[...] = jnp.full(s.maximum.shape, LOWEST, jnp.float32)
        s.total[...] = jnp.zeros(s.total.shape, jnp.float32)

    def attend(tokens: Tokens) -> None:
        taken = [_weigh(call, s, tokens, queries[pack], pack) for pack in range(packs)]
        for pack, (weights, keep) in enumerate(taken):
            _add_values(call, s, tokens, pack, weights, keep)

    step = min(call.blocks.decode_step, stream.block)

    def attend_masked(slot: Array, block: Array) -> None:
        at = start + block * stream.block

        @pl.loop(0, pl.cdiv(jnp.minimum(end - at, stream.block), step))
        def _(i: Array) -> None:
            offset = pl.multiple_of(i * step, step)
            attend(Tokens(stream.buffer.at[slot], offset, step, at + offset, end))

    @pl.loop(0, last)
    def _(block: Array) -> None:
        slot = stream.take(start, end, block, full=True)
        if call.spec.window is None:
            attend(Tokens(stream.buffer.at[slot], 0, stream.block, None, end))
        else:
            attend_masked(slot, block)

    attend_masked(stream.take(start, end, last), last)
    for pack in range(packs):
        total = jnp.sum(s.total[pack], axis=1, keepdims=True)
        result = s.value[pack] / total
        if call.scaled:
            result = result * s.value_scales[pack][:, :1]
        s.results[place, pack] = result


def _heads(call: Call, tokens: Tokens, pack: int, *, values: bool) -> Array:
    """-> keys or values of a pack's heads, side by side: [size, W] in the compute dtype."""
    heads = range(pack * call.blocks.pack, (pack + 1) * call.blocks.pack)
    channels = [call.layout.value_channel(head) if values else head for head in heads]
    at = pl.ds(tokens.offset, tokens.size)
    parts = [tokens.block[channel, at].astype(call.compute_dtype) for channel in channels]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _weigh(call: Call, s: Scratch, tokens: Tokens, q: Array, pack: int) -> tuple[Array, Array]:
    """-> the tokens' weights [R, size], and what to multiply earlier sums with [R, 128]; moves the maximum."""
    scores = call.scores(q, _heads(call, tokens, pack, values=False))
    if tokens.position is not None:
        at = tokens.position + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible = at < tokens.end
        if call.spec.window is not None:
            visible &= at >= tokens.end - call.spec.window
        scores = jnp.where(visible, scores, -jnp.inf)
    before = s.maximum[pack]
    maximum = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    s.maximum[pack] = maximum
    weights = jnp.exp2(scores - widen(maximum, tokens.size))
    keep = jnp.exp2(before - maximum)
    s.total[pack] = s.total[pack] * keep + fold(weights)
    return weights, keep


def _add_values(call: Call, s: Scratch, tokens: Tokens, pack: int, weights: Array, keep: Array) -> None:
    v = _heads(call, tokens, pack, values=True)
    if tokens.position is not None:  # beyond the end memory holds anything, and 0 * NaN is NaN
        at = tokens.position + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
        v = jnp.where(at < tokens.end, v, jnp.zeros_like(v))
    s.value[pack] = s.value[pack] * widen(keep, v.shape[1]) + call.dot(weights.astype(v.dtype), v, (1, 0))
