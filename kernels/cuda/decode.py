"""Decode attention: rows with one token, a KV head's query heads together, split over the context if rows are few."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.tile import (
    LOG2_E,
    NOTHING,
    Options,
    Softmax,
    Tiles,
    attend,
    exp2,
    finish,
    launch,
    load_rows,
    options_of,
    padded,
    start,
    store_rows,
)

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec, RaggedBatch

LEAST_SHARE = 128  # tokens of context that are worth a program of their own
WAVE = 4  # programs that a multiprocessor runs at a time


def num_splits(rows: int, kv_heads: int, context: int, multiprocessors: int) -> int:
    """-> programs that share the context of one row and KV head: 1, or a power of two that fills the GPU once.

    `context` is the longest that there may be, in tokens. Two splits or more cost a second kernel.
    """
    fill = WAVE * multiprocessors // (rows * kv_heads)
    most = max(min(fill, context // LEAST_SHARE), 1)
    return 1 << (most.bit_length() - 1)


def decode(
    q: Array,
    out: Array | None,
    cache: Array,
    batch: RaggedBatch,
    spec: AttentionSpec,
    *,
    page_size: int,
    tiles: Tiles,
    splits: int,
    interpret: bool,
    sinks: Array | None = None,
    kv_scales: Array | None = None,
) -> Array:
    """q [T, K, G, D] of which the first num_decodes are rows with one token, cache [rows, D] -> [T, K, G, D].

    `out` [T, K, G, D], if given, is written to; what belongs to other rows stays as it is, or undefined.
    """
    tokens, K, G, D = q.shape
    rows = min(batch.page_table.shape[0], tokens)
    flat = jax.ShapeDtypeStruct((tokens * K * G, D), q.dtype)
    inputs = [batch.page_table, batch.kv_lens, batch.num_decodes[None], q.reshape(-1, D), cache]
    target = [] if out is None else [out.reshape(-1, D)]
    extra = options_of(sinks, kv_scales)

    def share(row: Array, lens: Any, num_decodes: Any) -> tuple[Array, Array, Array]:
        """-> a row's context: its first visible token, its end, and the tokens of it for one program."""
        end = jnp.where(row < num_decodes[0], lens[row], 0)
        first = jnp.int32(0) if spec.window is None else jnp.maximum(end - spec.window, 0)
        turns = pl.cdiv(pl.cdiv(end - first, splits), tiles.context)
        least = 0 if splits == 1 else LEAST_SHARE
        return first, end, jnp.maximum(turns * tiles.context, least)

    def attend_split(table: Any, lens: Any, num_decodes: Any, queries: Any, cache: Any, *rest: Any) -> None:
        refs = list(rest)
        options = Options.take(refs, sinks, kv_scales)
        head, split, row = (pl.program_id(i) for i in range(3))
        first, length, size = share(row, lens, num_decodes)
        begin = first + split * size
        end = jnp.minimum(begin + size, length)
        member = jnp.arange(tiles.queries, dtype=jnp.int32)  # of the group; those past its end repeat the last
        q_rows = (row * K + head) * G + jnp.minimum(member, G - 1)

        def pages_of(at: Array) -> Array:
            last = jnp.maximum(jnp.minimum(at, end - 1), 0)
            return plgpu.load(table.at[row, last >> (page_size.bit_length() - 1)])

        state = attend(
            start(tiles.queries, padded(D)), load_rows(queries, q_rows), cache, pages_of, head, spec, page_size,
            tiles.context, (begin, 0, pl.cdiv(jnp.maximum(end - begin, 0), tiles.context)),
            lambda at: (at < end)[None, :], interpret, options.scale_of(0, head, K),
        )  # fmt: skip
        value_scale = options.scale_of(1, head, K)
        if splits == 1:
            out = refs[-1]
            own_sinks = options.sinks_of(head * G + jnp.minimum(member, G - 1))
            value = finish(state, interpret, own_sinks, value_scale)
            store_rows(out, q_rows, value.astype(out.dtype), (member < G) & (row < num_decodes[0]))
        else:
            values, logs = refs
            part = ((row * K + head) * G + jnp.minimum(member, G - 1)) * splits + split
            used = (member < G) & (begin < end)
            store_rows(values, part, finish(state, interpret, None, value_scale), used)
            log = state.maximum + jnp.log(state.total) * LOG2_E
            plgpu.store(logs.at[jnp.where(used, part, logs.shape[0])], log, mask=used)

    def combine(lens: Any, num_decodes: Any, values: Any, logs: Any, *rest: Any) -> None:
        refs = list(rest)
        options = Options.take(refs, sinks, None)
        member, head, row = (pl.program_id(i) for i in range(3))
        first, length, size = share(row, lens, num_decodes)
        split = jnp.arange(splits, dtype=jnp.int32)
        used = first + split * size < length
        at = (row * K + head) * G + member
        log = plgpu.load(logs.at[at * splits + split], mask=used, other=NOTHING)
        value = jnp.where(used[:, None], load_rows(values, at * splits + jnp.where(used, split, 0)), 0.0)
        highest = jnp.max(log)
        weight = jnp.where(used, exp2(log - highest, interpret), 0.0)
        one = jnp.full(1, at)
        total = jnp.sum(value * weight[:, None], axis=0)[None]
        state = Softmax(jnp.full(1, highest), jnp.sum(weight)[None], total)
        mean = finish(state, interpret, options.sinks_of(jnp.full(1, head * G + member)))
        out = refs[-1]
        store_rows(out, one, mean.astype(out.dtype), jnp.full(1, row < num_decodes[0]))

    if splits == 1:
        result = launch(
            attend_split, inputs + extra + target, flat, grid=(K, 1, rows), tiles=tiles, interpret=interpret,
            aliases={len(inputs) + len(extra): 0} if target else None,
        )  # fmt: skip
        return result.reshape(q.shape)
    parts = rows * K * G * splits
    partial = (jax.ShapeDtypeStruct((parts, D), jnp.float32), jax.ShapeDtypeStruct((parts,), jnp.float32))
    values, logs = launch(
        attend_split, inputs + extra, partial, grid=(K, splits, rows), tiles=tiles, interpret=interpret
    )
    rest = [batch.kv_lens, batch.num_decodes[None], values, logs, *options_of(sinks, None)]
    result = launch(
        combine, rest + target, flat, grid=(G, K, rows), tiles=tiles._replace(warps=1), interpret=interpret,
        aliases={len(rest): 0} if target else None,
    )  # fmt: skip
    return result.reshape(q.shape)
