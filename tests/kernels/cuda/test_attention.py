"""The GPU kernels in interpret mode, on the CPU: wrappers and index arithmetic, not speed."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import BACKENDS, AttentionSpec, Backend, RaggedBatch, choose_backend
from kernels.cuda.attention import decode_tiles, prefill_tiles, update_and_attend
from kernels.cuda.blocks import query_blocks
from kernels.cuda.decode import num_splits
from tests.kernels.cases import CASES, CHUNKS, DECODES, Case, run

SPEC = AttentionSpec(2, 3, 64, 0.125)


def interpreted(multiprocessors: int) -> Backend:
    attend = partial(update_and_attend, interpret=True, multiprocessors=multiprocessors)
    return BACKENDS["triton"]._replace(update_and_attend=attend)


UNSPLIT, SPLIT = interpreted(1), interpreted(132)
NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    ("case", "backend", "dtype"),
    [
        (NAMED["decode"], SPLIT, "bfloat16"),
        (NAMED["mixed"], SPLIT, "float32"),
        (NAMED["mixed"], UNSPLIT, "bfloat16"),
        (NAMED["head 80"], UNSPLIT, "float32"),
        (NAMED["window"], SPLIT, "float32"),
        (NAMED["window, many masked"], UNSPLIT, "float32"),
        (NAMED["soft cap"], UNSPLIT, "float32"),
        (NAMED["page 256"], UNSPLIT, "float32"),
        (NAMED["sinks, window"], UNSPLIT, "float32"),
        (NAMED["sinks"], SPLIT, "float32"),
        (NAMED["e4m3, scales"], SPLIT, "float32"),
        (NAMED["e5m2"], UNSPLIT, "bfloat16"),
        (NAMED["int8, scales"], UNSPLIT, "float32"),
        (Case("head 256, mha", AttentionSpec(1, 1, 256, 1 / 16), CHUNKS[1:4], page_size=8), SPLIT, "float16"),
        (Case("window, decode, split", AttentionSpec(1, 2, 64, 0.125, window=300), DECODES), SPLIT, "float32"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_kernels_agree_with_the_reference(case: Case, backend: Backend, dtype: str):
    got, wanted, after, before, owned = run(case, backend, dtype)
    tolerance = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}[dtype]
    assert np.abs(got - wanted).max() < tolerance
    others = np.setdiff1d(np.arange(after.shape[0]), owned)
    np.testing.assert_array_equal(np.asarray(after[others], np.float32), np.asarray(before[others], np.float32))


def test_context_is_split_only_where_rows_leave_multiprocessors_idle():
    assert num_splits(256, 8, 4096, 132) == 1
    assert num_splits(64, 8, 4096, 132) == 1
    assert num_splits(8, 8, 8192, 132) == 8
    assert num_splits(1, 8, 8192, 132) == 64
    assert num_splits(1, 8, 512, 132) == 4, "a share has 128 tokens at least"
    assert num_splits(1, 1, 64, 132) == 1


def test_every_query_of_a_chunk_is_in_one_block_and_no_decode_is():
    counts, before = np.array([1, 1, 5, 64, 33, 0]), np.array([9, 300, 0, 3, 70, 0])
    starts = np.concatenate([[0], np.cumsum(counts)])
    array = lambda values: jnp.asarray(values, jnp.int32)
    batch = RaggedBatch(
        jnp.zeros((6, 1), jnp.int32), array(counts + before), array(starts), array(5), array(2), array([]), array([])
    )
    row, token, position, count = np.asarray(query_blocks(batch, tokens=128, size=16))
    seen = np.concatenate([np.arange(t, t + n) for t, n in zip(token, count, strict=True)])
    assert sorted(seen) == list(range(2, starts[-1]))
    used = count > 0
    np.testing.assert_array_equal(position[used], before[row[used]] + token[used] - starts[row[used]])
    assert (position >= 0).all() and (token >= 0).all(), "an unused block would loop from there"
    assert count.max() <= 16 and not used[used.sum() :].any()
    assert (np.diff(position[used])[np.diff(row[used]) == 0] < 0).all(), "the longest context of a row comes first"


@pytest.mark.parametrize("group", [1, 3, 8, 40])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_tiles_hold_a_group_and_are_powers_of_two(group: int, head_dim: int):
    spec = AttentionSpec(1, group, head_dim, 1.0)
    for dtype, kv_dtype in (("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float32", "float32")):
        given = jnp.dtype(dtype), jnp.dtype(kv_dtype)
        for tiles in (decode_tiles(spec, *given), prefill_tiles(spec, given[0])):
            assert tiles.queries >= max(group, 16)
            assert all(size & (size - 1) == 0 for size in (tiles.queries, tiles.context, tiles.warps))


def test_a_gpu_gets_these_kernels_unless_something_is_not_supported():
    assert choose_backend("auto", "gpu", {SPEC}, 16, "bfloat16").name == "triton"
    assert choose_backend("auto", "gpu", {AttentionSpec(1, 1, 512, 1.0)}, 16, "bfloat16").name == "xla"
    with pytest.raises(ValueError, match="triton: no KV cache of dtype float8_e3m4"):
        choose_backend("triton", "gpu", {SPEC}, 16, "float8_e3m4")
