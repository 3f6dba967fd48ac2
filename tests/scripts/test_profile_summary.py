"""scripts/profile_summary.py: operations are told apart by the scopes that they were traced in."""

from __future__ import annotations

import importlib.util
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "profile_summary.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("profile_summary", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_cpu_did_is_told_by_its_scopes(script, tmp_path):
    never_seen = random.SystemRandom().random()  # what comes from JAX's cache has lost its scopes

    @jax.jit
    def step(x):
        with jax.named_scope("attend"):
            x = jnp.sin(x @ x + never_seen)
        y = x @ x.T
        with jax.named_scope("sample"):
            return jnp.sort(y, axis=-1)

    x = np.ones((256, 256), np.float32)
    step(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            step(x).block_until_ready()
    events = script.read(tmp_path)["/device:CPU"]
    kinds = {name: count for name, count, _ in script.totals(events, script.kind_of)}
    assert {"attention", "products", "sampling"} <= kinds.keys()
    assert kinds["products"] == 3
    span = max(e.start + e.length for e in events) - min(e.start for e in events)
    assert 0 < script.busy(events) <= span


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [
        ("fusion.1", "jit(step)/_layer/attention/attend/exp", "attention"),
        ("dot.2", "jit(step)/_layer/attention/dot_general", "products"),
        ("fusion.3", "jit(step)/sample/logits/dot_general", "products"),
        ("fusion.4", "jit(step)/sample/argmax", "sampling"),
        ("fusion.5", "jit(step)/embed/gather", "other"),
        ("all-reduce.6", "jit(step)/_layer/mlp/dot_general", "collectives"),
        ("ncclDevKernel_AllReduce", "", "collectives"),
        ("nvjet_hsh_128x256", "", "products"),
        ("paged_decode_kernel", "", "attention"),
        ("loop_fusion", "", "other"),
    ],
)
def test_a_path_comes_before_a_name(script, name, path, kind):
    assert script.kind_of(script.Event(name, 0.0, 1.0, path)) == kind


def test_overlapping_events_count_once(script):
    at = lambda start, length: script.Event("x", start, length)
    assert script.busy([at(0, 10), at(5, 10), at(30, 5), at(31, 1)]) == 20


def test_a_folder_without_a_trace_is_told(script, tmp_path):
    with pytest.raises(ValueError, match=r"no \*\.xplane\.pb"):
        script.read(tmp_path)
