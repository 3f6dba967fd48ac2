"""Hopper's prefill kernel without the GPU: its index arithmetic, its results in interpret mode, and its lowering."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import BACKENDS, AttentionSpec, RaggedBatch, choose_backend
from kernels.cuda import hopper
from kernels.cuda.attention import cache_spec, write
from kernels.cuda.mosaic import why_not_this_jax
from tests.kernels.cases import Case, run

needs_mosaic = pytest.mark.skipif(
    why_not_this_jax() is not None, reason="the kernel is written for another JAX's Mosaic GPU backend"
)
SPEC = AttentionSpec(2, 4, 64, 0.125)
CAPPED = AttentionSpec(1, 3, 64, 0.125, soft_cap=5.0)
WINDOWED = AttentionSpec(1, 8, 64, 0.125, window=20)


def batch_of(rows: list[tuple[int, int]], decodes: int) -> RaggedBatch:
    """rows: (tokens in this step, tokens before it)."""
    counts, before = np.array(rows).T
    array = lambda values: jnp.asarray(values, jnp.int32)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return RaggedBatch(
        array(np.zeros((len(rows), 1))), array(counts + before), array(starts), array(len(rows)), array(decodes),
        array([]), array([]),
    )  # fmt: skip


@pytest.mark.parametrize("near", [1, 400, 10**6])
def test_every_query_of_a_chunk_is_in_one_aligned_block_and_no_decode_is(near: int):
    rows = [(1, 9), (1, 300), (5, 0), (64, 3), (33, 70), (1, 12), (40, 1000), (0, 0)]
    batch = batch_of(rows, decodes=2)
    row, token, position, count, skipped = np.asarray(hopper.aligned_blocks(batch, tokens=160, size=16, near=near))
    starts, lens, used = np.asarray(batch.cu_q_lens), np.asarray(batch.kv_lens), count > 0
    seen = np.concatenate([np.arange(t + s, t + n) for t, n, s in zip(token, count, skipped, strict=True)])
    assert sorted(seen) == list(range(2, starts[-1]))
    assert (token % hopper.ALIGNED == 0).all() and (token >= 0).all() and count.max() <= 16
    assert (skipped < np.maximum(count, 1)).all() and not used[used.sum() :].any()
    end = position + starts[row + 1] - token  # of the row, from a block's first token and position on
    np.testing.assert_array_equal(end[used], lens[row[used]])


def test_blocks_that_see_more_come_first_among_rows_that_fit_the_cache_together():
    batch = batch_of([(64, 0), (64, 64), (64, 0), (64, 256)], decodes=0)
    row, _, position, count, _ = np.asarray(hopper.aligned_blocks(batch, tokens=256, size=32, near=200))
    used = count > 0
    assert row[used].tolist() == [1, 1, 0, 0, 2, 2, 3, 3], "200 tokens: rows 0 and 1, then row 2, then row 3"
    assert position[used].tolist() == [96, 64, 32, 0, 32, 0, 288, 256]


@pytest.mark.parametrize(("group", "together", "each"), [(1, 1, 64), (3, 3, 16), (4, 4, 16), (7, 7, 8), (16, 8, 8)])
def test_heads_of_a_group_share_a_warpgroup_in_whole_copies(group: int, together: int, each: int):
    plan = hopper.Plan(AttentionSpec(2, group, 64, 1.0), page_size=16, context=128, stages=2, programs=1)
    assert (plan.together, plan.each) == (together, each)
    assert plan.units * together == 2 * group and plan.each * together <= hopper.ROWS


@needs_mosaic
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case("sinks, cap", CAPPED, ((1, 3), (5, 0), (37, 80)), sinks=True), "bfloat16"),
        (Case("window", WINDOWED, ((30, 90), (3, 5)), page_size=128), "float16"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_kernel_agrees_with_the_reference(case: Case, dtype: str):
    def attend(q, k, v, cache, batch, spec, *, sinks=None, kv_scales=None):
        cache = write(k, v, cache, batch)
        options = {"context": 64, "multiprocessors": 2, "interpret": True}
        return hopper.prefill(q, cache, batch, spec, sinks=sinks, **options), cache

    got, wanted, *_ = run(case, BACKENDS["hopper"]._replace(update_and_attend=attend), dtype)
    decodes = sum(count == 1 for count, _ in case.rows)  # are another kernel's
    assert np.abs(got - wanted)[decodes:].max() < {"bfloat16": 2e-2, "float16": 4e-3}[dtype]


@needs_mosaic
@pytest.mark.parametrize(
    ("spec", "page_size", "dtype"),
    [
        (AttentionSpec(8, 4, 128, 0.1), 16, "bfloat16"),
        (AttentionSpec(8, 8, 64, 0.1, window=128, soft_cap=30.0), 8, "float16"),
        (AttentionSpec(4, 7, 128, 0.1), 256, "bfloat16"),
    ],
)
def test_kernel_lowers_for_a_gpu(spec: AttentionSpec, page_size: int, dtype: str):
    given = jax.ShapeDtypeStruct
    ints = lambda *shape: given(shape, jnp.int32)
    batch = RaggedBatch(ints(4, 16), ints(4), ints(5), ints(), ints(), ints(64), ints(64))
    q = given((64, spec.num_kv_heads, spec.group, spec.head_dim), dtype)
    sinks = given((spec.num_kv_heads, spec.group), jnp.float32)
    step = jax.jit(partial(hopper.prefill, multiprocessors=132), static_argnames="spec")
    traced = step.trace(q, cache_spec(spec, 9, page_size, dtype), batch, spec=spec, sinks=sinks)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
def test_a_hopper_gpu_gets_this_kernel_unless_something_is_not_supported(monkeypatch: pytest.MonkeyPatch):
    device = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    chosen = lambda spec, page_size, dtype: choose_backend("auto", "gpu", {spec}, page_size, dtype).name
    assert chosen(SPEC, 16, "bfloat16") == "hopper"
    assert chosen(SPEC, 4, "bfloat16") == "triton"
    assert chosen(SPEC, 16, "float8_e4m3fn") == "triton"
    assert chosen(AttentionSpec(1, 1, 80, 1.0), 16, "bfloat16") == "triton"
    device.compute_capability = "10.0"
    with pytest.raises(ValueError, match="hopper: no GPU of compute capability 9 here"):
        choose_backend("hopper", "gpu", {SPEC}, 16, "bfloat16")
