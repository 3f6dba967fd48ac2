"""Paged attention on TPUs: one kernel writes new keys and values, then attends from decodes, then from chunks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas import decode, prefill, write
from kernels.pallas.blocks import Blocks, Chip, fit, fit_tables, padded_bytes, preferred, this_chip
from kernels.pallas.call import IN_SMEM, Arrays, Call
from kernels.pallas.layout import EDGE, SUBLANES, ceil_to, layout_of
from kernels.pallas.stream import Stream, stream_types
from kernels.pallas.tuned import tuned

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec, RaggedBatch

KV_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
Types = tuple[Any, ...]  # of scratch memory; None where it is not needed


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
    chip: Chip | None = None,
) -> tuple[Array, Array]:
    """See kernels.attention.Backend. Results of padding tokens are undefined, and padding is not written anywhere.

    `blocks`: where to start from, if not from the computed ones; `chip`: if not the one in use.
    Errors: ValueError if nothing fits the chip's memories.
    """
    tokens, (rows, pages) = q.shape[0], batch.page_table.shape
    only_decodes = tokens <= rows
    if tokens % EDGE and tokens > SUBLANES:
        room = ceil_to(tokens, EDGE) - tokens
        more = lambda x: jnp.pad(x, ((0, room),) + ((0, 0),) * (x.ndim - 1))
        q, k, v = more(q), more(k), None if v is None else more(v)
    layout, page_size = layout_of(spec), cache.shape[2]
    chip = chip or this_chip()
    call = Call(
        spec, layout, blocks or preferred(spec, layout, chip, page_size), page_size, q.shape[0], q.dtype, cache.dtype,
        kv_scales is not None, sinks is not None,
    )  # fmt: skip
    if blocks is None:
        call = replace(call, blocks=tuned(call.blocks, call, chip.generation))
    call, vmem = with_fitting_blocks(call, only_decodes, rows, pages, chip)
    by_head = lambda x: None if x is None else x.swapaxes(0, 1)
    as_float = lambda x: None if x is None else x.astype(jnp.float32)
    arrays = Arrays(
        batch.kv_lens, batch.cu_q_lens, jnp.stack([batch.num_rows, batch.num_decodes]), batch.write_page,
        as_float(sinks), as_float(kv_scales), batch.page_table[:, None, :], q.transpose(1, 2, 0, 3), by_head(k),
        by_head(v), None, cache,
    )  # fmt: skip
    out, cache = _launch(call, arrays, only_decodes, interpret, min(2 * vmem, int(0.97 * chip.vmem)))
    return out.transpose(2, 0, 1, 3)[:tokens], cache


def phase_types(call: Call, only_decodes: bool, pages: int) -> dict[str, Types]:
    """-> the scratch memory of each phase, which has it to itself."""
    stream = partial(stream_types, call.layout, call.blocks.slots, call.blocks.tables, pages, call.kv_dtype)
    types: dict[str, Types] = {
        "write decodes": write.scratch_types(call, SUBLANES, True),
        "decode": (*stream(call.blocks.decode_kv), *decode.scratch_types(call)),
    }
    if not only_decodes:
        types["write chunks"] = write.scratch_types(call, min(call.blocks.write, call.page_size), False)
        types["prefill"] = (*stream(call.blocks.prefill_kv), *prefill.scratch_types(call))
    return types


def with_fitting_blocks(call: Call, only_decodes: bool, rows: int, pages: int, chip: Chip) -> tuple[Call, int]:
    """-> the call with blocks that fit, and the bytes of VMEM that they take. Errors: ValueError if none do."""

    def vmem_bytes(blocks: Blocks) -> int:
        types = phase_types(replace(call, blocks=blocks), only_decodes, pages).values()
        in_vmem = lambda t: getattr(t, "memory_space", None) == pltpu.VMEM
        return max(sum(padded_bytes(t.shape, t.dtype) for t in phase if in_vmem(t)) for phase in types)

    heads, group = call.layout.heads, call.spec.group
    scalars = 4 * (2 * rows + call.tokens + heads * (group * call.sinks + 2 * call.scaled)) + 4096
    blocks = fit(call.blocks, call.page_size, vmem_bytes, chip)
    blocks = replace(blocks, tables=fit_tables(pages, scalars, blocks.tables, chip))
    return replace(call, blocks=blocks), vmem_bytes(blocks)


def _launch(call: Call, arrays: Arrays, only_decodes: bool, interpret: Any, vmem_limit: int) -> tuple[Array, Array]:
    """`arrays` with values -> out and cache."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    given = {name: value for name, value in arrays._asdict().items() if value is not None}
    names = list(given)
    heads, group, tokens, _ = arrays.q.shape

    def kernel(*refs: Any) -> None:
        *inputs, out, cache = refs
        named = dict(zip(names, inputs, strict=True)) | {"out": out, "cache": cache}
        _body(call, Arrays(**(dict.fromkeys(Arrays._fields) | named)), only_decodes)

    return pl.pallas_call(
        kernel,
        name="paged_attention",
        out_shape=[
            jax.ShapeDtypeStruct((heads, group, tokens, call.layout.value_dim), arrays.q.dtype),
            jax.ShapeDtypeStruct(arrays.cache.shape, arrays.cache.dtype),
        ],
        in_specs=[smem if name in IN_SMEM else hbm for name in names],
        out_specs=[hbm, hbm],
        input_output_aliases={names.index("cache"): 1},
        # Page numbers come from the engine's own pool; checking each copy's bounds costs as much as starting it.
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_limit, disable_bounds_checks=True),
        interpret=interpret,
    )(*given.values())


def _body(call: Call, arrays: Arrays, only_decodes: bool) -> None:
    num_rows, num_decodes = arrays.counts[0], arrays.counts[1]
    decodes_end = num_rows if only_decodes else num_decodes
    types = phase_types(call, only_decodes, arrays.table.shape[2])

    def scoped(name: str, do: Any) -> None:
        """do(refs), with None where there is no type."""
        used = [t for t in types[name] if t is not None]

        def body(*refs: Any) -> None:
            rest = iter(refs)
            do([None if t is None else next(rest) for t in types[name]])

        pl.run_scoped(body, *used)

    def stream(refs: list[Any], first: Any, end: Any, turns: Any, span: Any) -> Stream:
        buffer, arrived, tables, table_arrived, cursor = refs[:5]
        return Stream(
            arrays.cache, arrays.table, buffer, arrived, tables, table_arrived, cursor,
            call.page_size, first, end, turns, span,
        )  # fmt: skip

    def write_rows(first: Any, end: Any, refs: list[Any]) -> None:
        write.write(call, arrays, write.Scratch(*refs), first, end)

    def run_decode(refs: list[Any]) -> None:
        read = lambda row, turn: decode.span(call, arrays, row)
        pages = stream(refs, jnp.int32(0), decodes_end, lambda row: jnp.int32(1), read)
        decode.decode(call, arrays, pages, decode.Scratch(*refs[5:]))

    def run_prefill(refs: list[Any]) -> None:
        turns, span = partial(prefill.turns, call, arrays), partial(prefill.span, call, arrays)
        pages = stream(refs, num_decodes, num_rows, turns, span)
        prefill.prefill(call, arrays, pages, prefill.Scratch(*refs[5:]))

    scoped("write decodes", partial(write_rows, jnp.int32(0), decodes_end))
    if not only_decodes:
        scoped("write chunks", partial(write_rows, num_decodes, num_rows))
    scoped("decode", run_decode)
    if not only_decodes:
        scoped("prefill", run_prefill)
