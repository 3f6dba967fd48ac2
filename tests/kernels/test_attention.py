"""Every attention backend that runs here against the dense reference, on the shared list of cases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import BACKENDS, AttentionSpec, choose_backend, copy_pages
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
