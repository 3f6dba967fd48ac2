"""Paged attention on TPUs: one kernel writes new keys and values, then attends from decodes, then from prefill chunks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas import decode, prefill, write
from kernels.pallas.blocks import Blocks, preferred, this_chip
from kernels.pallas.call import Arrays, Call
from kernels.pallas.layout import SUBLANES, ceil_to, layout_of
from kernels.pallas.stream import Stream

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec, RaggedBatch

KV_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")


def supports(spec: AttentionSpec, page_size: int, kv_dtype: str) -> str | None:
    """See kernels.attention.Backend."""
    if kv_dtype not in KV_DTYPES:
        return f"no KV cache of dtype {kv_dtype}"
    if page_size < SUBLANES or page_size & (page_size - 1):
        return f"no pages of {page_size} tokens: powers of two from {SUBLANES} only"
    return None


def cache_spec(spec: AttentionSpec, num_pages: int, page_size: int, kv_dtype: str) -> jax.ShapeDtypeStruct:
    layout = layout_of(spec)
    return jax.ShapeDtypeStruct((num_pages, layout.channels, page_size, layout.lanes), kv_dtype)


def update_and_attend(
    q: Array,
    k: Array,
    v: Array | None,
    cache: Array,
    batch: RaggedBatch,
    spec: AttentionSpec,
    *,
    sinks: Array | None = None,
    kv_scales: Array | None = None,
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> tuple[Array, Array]:
    """See kernels.attention.Backend. Results of padding tokens are undefined, and padding is not written anywhere."""
    tokens = q.shape[0]
    if tokens % SUBLANES and tokens > SUBLANES:
        room = ceil_to(tokens, SUBLANES) - tokens
        more = lambda x: None if x is None else jnp.pad(x, ((0, room),) + ((0, 0),) * (x.ndim - 1))
        q, k, v = more(q), more(k), more(v)
    by_head = lambda x: None if x is None else x.swapaxes(0, 1)
    layout = layout_of(spec)
    blocks = blocks or preferred(spec, layout, this_chip(), cache.shape[2])
    call = Call(
        spec, layout, blocks, cache.shape[2], q.shape[0], q.dtype, cache.dtype,
        kv_scales is not None, sinks is not None,
    )  # fmt: skip
    arrays = Arrays(
        batch.kv_lens, batch.cu_q_lens, jnp.stack([batch.num_rows, batch.num_decodes]), batch.write_page,
        None if sinks is None else sinks.astype(jnp.float32),
        None if kv_scales is None else kv_scales.astype(jnp.float32),
        batch.page_table[:, None, :], q.transpose(1, 2, 0, 3), by_head(k), by_head(v), None, cache,
    )  # fmt: skip
    only_decodes = tokens <= batch.page_table.shape[0]
    out, cache = _launch(call, arrays, only_decodes, interpret)
    return out.transpose(2, 0, 1, 3)[:tokens], cache


def _launch(call: Call, arrays: Arrays, only_decodes: bool, interpret: Any) -> tuple[Array, Array]:
    """`arrays` with values -> out and cache."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    names = [name for name, value in arrays._asdict().items() if value is not None]
    places = {name: smem if name in Arrays._fields[:6] else hbm for name in names}
    heads, group, tokens, _ = arrays.q.shape

    def kernel(*refs: Any) -> None:
        *inputs, out, cache = refs
        given = dict(zip(names, inputs, strict=True)) | {"out": out, "cache": cache}
        _body(call, Arrays(**(dict.fromkeys(Arrays._fields) | given)), only_decodes)

    return pl.pallas_call(
        kernel,
        name="paged_attention",
        out_shape=[
            jax.ShapeDtypeStruct((heads, group, tokens, call.layout.value_dim), arrays.q.dtype),
            jax.ShapeDtypeStruct(arrays.cache.shape, arrays.cache.dtype),
        ],
        in_specs=list(places.values()),
        out_specs=[hbm, hbm],
        input_output_aliases={names.index("cache"): 1},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=100 << 20, disable_bounds_checks=True),
        interpret=interpret,
    )(*(value for value in arrays if value is not None))


def _body(call: Call, arrays: Arrays, only_decodes: bool) -> None:
    num_rows, num_decodes = arrays.counts[0], arrays.counts[1]
    decodes_end = num_rows if only_decodes else num_decodes
    with_writes = [(SUBLANES, True, 0, decodes_end)]
    if not only_decodes:
        with_writes.append((min(call.blocks.write, call.page_size), False, num_decodes, num_rows))
    for piece, single, first, end in with_writes:
        types = write.scratch_types(call, piece, single)
        pl.run_scoped(lambda *refs, a=first, b=end: write.write(call, arrays, write.Scratch(*refs), a, b), *types)

    def run(phase: Any, scratch: Any, types: Any, block: int, first: Any, end: Any, turns: Any, span: Any) -> None:
        slots, tables = call.blocks.slots, call.blocks.tables
        stream_types = (
            pltpu.VMEM((slots, call.layout.channels, block, call.layout.lanes), call.kv_dtype),
            pltpu.SemaphoreType.DMA((slots,)),
            pltpu.SMEM((tables, *arrays.table.shape[1:]), jnp.int32),
            pltpu.SemaphoreType.DMA((tables,)),
            pltpu.SMEM((5,), jnp.int32),
        )
        used = [t for t in types if t is not None]

        def body(*refs: Any) -> None:
            stream = Stream(arrays.cache, arrays.table, *refs[:5], call.page_size, first, end, turns, span)
            rest = iter(refs[5:])
            phase(call, arrays, stream, scratch(*(None if t is None else next(rest) for t in types)))

        pl.run_scoped(body, *stream_types, *used)

    run(
        decode.decode, decode.Scratch, decode.scratch_types(call), call.blocks.decode_kv, jnp.int32(0), decodes_end,
        lambda row: jnp.int32(1), lambda row, turn: decode.span(call, arrays, row),
    )  # fmt: skip
    if not only_decodes:
        run(
            prefill.prefill, prefill.Scratch, prefill.scratch_types(call), call.blocks.prefill_kv, num_decodes,
            num_rows, partial(prefill.turns, call, arrays), partial(prefill.span, call, arrays),
        )  # fmt: skip
