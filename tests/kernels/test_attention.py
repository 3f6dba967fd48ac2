"""Every attention backend that runs here against the dense reference, on the shared list of cases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import BACKENDS, AttentionSpec, RaggedBatch, Runs, choose_backend, copy_pages
from tests.kernels.cases import CASES, Case, run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if "cpu" in backend.platforms])
def test_backend_agrees_with_the_reference(name: str, dtype: str, tolerance: float, case: Case):
    got, wanted, after, before, owned = run(case, BACKENDS[name], dtype)
    assert np.abs(got - wanted).max() < tolerance
    others = np.setdiff1d(np.arange(jax.tree.leaves(after)[0].shape[0]), owned)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(new[others], np.float32), np.asarray(old[others], np.float32))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sinks", [False, True])
def test_runs_of_decodes_are_what_they_are_one_by_one(window: int | None, sinks: bool):
    spec, page, lengths, counts = AttentionSpec(2, 3, 16, 0.25, window=window), 8, [30, 3, 17], [4, 1, 3]
    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    rows = sum(counts)
    run_of = np.repeat(np.arange(3), counts)
    positions = np.concatenate([np.arange(n, n + count) for n, count in zip(lengths, counts, strict=True)])
    tables = np.arange(1, 16).reshape(3, 5)
    ints = lambda values: jnp.asarray(values, jnp.int32)
    batch = RaggedBatch(
        ints(tables[run_of]), ints(positions + 1), ints(np.arange(rows + 1)), ints(rows), ints(rows),
        ints(tables[run_of, positions // page]), ints(positions % page),
    )  # fmt: skip
    backend = BACKENDS["xla"]
    cache = jax.tree.map(lambda s: array(*s.shape), backend.cache_spec(spec, 16, page, "float32"))
    inputs = array(rows, 2, 3, 16), array(rows, 2, 16), array(rows, 2, 16), cache
    options = {"sinks": array(2, 3) if sinks else None}
    wanted, _ = backend.update_and_attend(*inputs, batch, spec, **options)
    together = batch.replace(runs=Runs(ints([0, 4, 5]), ints(run_of), 4))
    got, _ = backend.update_and_attend(*inputs, together, spec, **options)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_named_backend_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="attention_backend: 'flash' is not one of"):
        choose_backend("flash", "cpu", set(), 16, "float32")


def test_a_named_backend_that_does_not_fit_is_an_error_with_the_reason():
    with pytest.raises(ValueError, match="xla: no KV cache of dtype float8_e3m4"):
        choose_backend("xla", "cpu", {AttentionSpec(1, 1, 64, 1.0)}, 16, "float8_e3m4")


def test_copied_pages_are_read_before_any_is_written():
    pages = jnp.arange(12.0).reshape(4, 3)
    (copied,) = copy_pages([pages], jnp.array([1, 2]), jnp.array([2, 3]))
    np.testing.assert_array_equal(copied, pages[jnp.array([0, 1, 1, 2])])
