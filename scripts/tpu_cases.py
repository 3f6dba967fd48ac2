"""The cases that the TPU attention kernel is reported on and tuned for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from tpu_compiler import GENERATIONS

from kernels.attention import AttentionSpec, RaggedBatch
from kernels.pallas import attention
from kernels.pallas.blocks import Blocks, Chip, preferred
from kernels.pallas.call import Call
from kernels.pallas.layout import layout_of
from kernels.pallas.tuned import tuned

HEADS = {
    "llama-8b": AttentionSpec(8, 4, 128, 128**-0.5),
    "qwen3-0.6b": AttentionSpec(8, 2, 128, 128**-0.5),
    "gemma-3": AttentionSpec(1, 4, 256, 256**-0.5, window=512),
    "64/8": AttentionSpec(8, 8, 128, 128**-0.5),
}
DTYPES = ("bfloat16", "float8_e4m3fn")
PAGES = (128, 16, 256, 32, 64)
ROWS, LENGTH = 64, 2048  # decodes, and tokens of each row's context
PHASES = ("decode", "mixed", "prefill")
BATCHES = {  # rows, tokens of the longest context, tokens of a step
    "decode": (ROWS, LENGTH, ROWS),
    "mixed": (ROWS, LENGTH, 2048),
    "prefill": (8, LENGTH, 2048),
    "4096 decodes": (4096, LENGTH, 4096),
    "contexts of 1M": (8, 1 << 20, 2048),
}


class Case(NamedTuple):
    generation: str
    heads: str
    kv_dtype: str
    page: int
    phase: str

    @property
    def only_decodes(self) -> bool:
        rows, _, tokens = BATCHES[self.phase]
        return tokens <= rows


def grid(which: str) -> list[Case]:
    if which == "full":
        parts = itertools.product(PHASES, PAGES, DTYPES, HEADS, GENERATIONS)
        return [Case(generation, heads, dtype, page, phase) for phase, page, dtype, heads, generation in parts]
    return [
        Case("v6e", "llama-8b", "bfloat16", 128, "decode"), Case("v6e", "llama-8b", "bfloat16", 128, "prefill"),
        Case("v4", "64/8", "bfloat16", 256, "mixed"), Case("v5e", "qwen3-0.6b", "float8_e4m3fn", 16, "decode"),
        Case("v5p", "gemma-3", "bfloat16", 64, "mixed"), Case("v7x", "llama-8b", "float8_e4m3fn", 32, "decode"),
        Case("v4", "llama-8b", "bfloat16", 16, "4096 decodes"), Case("v5e", "64/8", "bfloat16", 16, "contexts of 1M"),
    ]  # fmt: skip


def batch_shapes(case: Case) -> RaggedBatch:
    rows, length, tokens = BATCHES[case.phase]
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    return RaggedBatch(i32(rows, length // case.page), i32(rows), i32(rows + 1), i32(), i32(), i32(tokens), i32(tokens))


def final_call(case: Case, chip: Chip, blocks: Blocks | None = None) -> tuple[Call, int]:
    """-> the call with the blocks that it is compiled with, and their bytes of VMEM."""
    spec, (rows, length, tokens) = HEADS[case.heads], BATCHES[case.phase]
    layout = layout_of(spec)
    first = blocks or preferred(spec, layout, chip, case.page)
    call = Call(spec, layout, first, case.page, tokens, jnp.bfloat16, jnp.dtype(case.kv_dtype), False, False)
    if blocks is None:
        call = replace(call, blocks=tuned(first, call, chip.generation))
    return attention.with_fitting_blocks(call, case.only_decodes, rows, length // case.page, chip)
