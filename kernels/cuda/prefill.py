"""Prefill attention: rows with several tokens, cut into blocks of queries over the flat token axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.blocks import query_blocks
from kernels.cuda.tile import (
    Options,
    Tiles,
    attend,
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


def prefill(
    q: Array,
    cache: Array,
    batch: RaggedBatch,
    spec: AttentionSpec,
    *,
    page_size: int,
    tiles: Tiles,
    interpret: bool,
    sinks: Array | None = None,
    kv_scales: Array | None = None,
) -> Array:
    """q [T, K, G, D], cache [rows, D] -> [T, K, G, D], undefined where a token's row is not from num_decodes on."""
    tokens, K, G, D = q.shape
    size = max(tiles.queries // G, 1)
    Q, block = max(tiles.queries, padded(G)), tiles.context
    blocks = query_blocks(batch, tokens, size)

    def prefill_blocks(blocks: Any, table: Any, queries: Any, cache: Any, *rest: Any) -> None:
        refs = list(rest)
        options = Options.take(refs, sinks, kv_scales)
        out = refs[-1]
        head, index = pl.program_id(0), pl.program_id(1)
        row, token, position, count = (blocks[i, index] for i in range(4))
        lane = jnp.arange(Q, dtype=jnp.int32)
        turn = lane // G  # which of the block's queries; those past its end repeat the last
        q_rows = ((token + jnp.minimum(turn, jnp.maximum(count - 1, 0))) * K + head) * G + lane % G
        end = position + count
        first = jnp.int32(0) if spec.window is None else jnp.maximum(position - spec.window + 1, 0)

        def pages_of(at: Array) -> Array:
            last = jnp.maximum(jnp.minimum(at, end - 1), 0)
            return plgpu.load(table.at[row, last >> (page_size.bit_length() - 1)])

        def visible(at: Array) -> Array:
            seen = at[None, :] <= (position + turn)[:, None]
            if spec.window is not None:
                seen &= at[None, :] > (position + turn - spec.window)[:, None]
            return seen

        taken = load_rows(queries, q_rows)
        last = jnp.where(count > 0, pl.cdiv(end - first, block), 0)
        # Up to here every query sees every token; then comes the diagonal.
        whole = 0 if spec.window is not None else jnp.minimum((position + 1) // block, last)
        state = start(Q, padded(D))
        for bounds, mask in ((first, 0, whole), None), ((first, whole, last), visible):
            state = attend(
                state, taken, cache, pages_of, head, spec, page_size, block, bounds, mask, interpret,
                options.scale_of(0, head, K),
            )  # fmt: skip
        value = finish(state, interpret, options.sinks_of(head * G + lane % G), options.scale_of(1, head, K))
        store_rows(out, q_rows, value.astype(out.dtype), turn < count)

    flat = jax.ShapeDtypeStruct((tokens * K * G, D), q.dtype)
    inputs = [blocks, batch.page_table, q.reshape(-1, D), cache, *options_of(sinks, kv_scales)]
    grid = (K, blocks.shape[1])
    return launch(prefill_blocks, inputs, flat, grid=grid, tiles=tiles, interpret=interpret).reshape(q.shape)
