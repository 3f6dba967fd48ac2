"""The tuner: every batch size is found whatever the number of devices, nothing is lost when it is stopped."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_cases import tiles_to_try
from product_cases import FORMATS, random_weight
from product_plans import FIELDS, fits, neighbours, starts
from tune_kernels import shapes_of
from tuning import Job, search

from engine.weights.load import read_config
from kernels import tuned
from kernels.attention import AttentionSpec
from kernels.cuda import attention
from kernels.cuda.matrix import Tile
from kernels.cuda.product import Plan, default_plan, kind_of

TINY = Path(__file__).parents[1] / "data" / "tiny"
FILES = ("a.json", "b.json", "c.json")
JOBS = [Job(name, tokens, None) for name in FILES for tokens in tuned.BATCH_SIZES]


def quick(job: Job, worker: Any, stop: threading.Event) -> dict[str, Any]:
    time.sleep(0.001 * (job.tokens % 3))
    return {"kernel": "triton", "us": float(job.tokens), "worker": worker}


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_every_batch_size_is_there_whatever_the_number_of_devices(tmp_path, workers):
    outcome = search(JOBS, range(workers), quick, tmp_path, quiet=True)
    assert sorted(outcome.complete) == list(FILES)
    assert not outcome.failures
    assert not outcome.stopped
    assert sorted(path.name for path in tmp_path.iterdir()) == list(FILES)  # and nothing besides
    used = set()
    for name in FILES:
        table = tuned.read(tmp_path / name)
        assert tuple(table) == tuned.BATCH_SIZES
        assert all(entry["us"] == size for size, entry in table.items())
        used |= {entry["worker"] for entry in table.values()}
    assert used == set(range(workers))


def test_a_stopped_search_goes_on_where_it_was(tmp_path):
    done: list[Job] = []

    def interrupted(job: Job, worker: Any, stop: threading.Event) -> dict[str, Any]:
        done.append(job)
        return quick(job, worker, stop)

    stopping = JOBS[20]

    def stopped_by_user(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        write = tuned.write

        def write_until(path: Path, table: Any) -> None:
            write(path, table)
            if path.name.startswith(stopping.file) and stopping.tokens in table:
                stopped_by_user()

        patch.setattr(tuned, "write", write_until)
        outcome = search(JOBS, [0], interrupted, tmp_path, quiet=True)
    assert outcome.stopped
    assert outcome.complete == [FILES[0]]
    assert not (tmp_path / FILES[1]).exists()
    kept = tuned.read(tmp_path / f"{FILES[1]}.part")
    assert stopping.tokens in kept

    before = set(done)
    done.clear()
    outcome = search(JOBS, [0, 1], interrupted, tmp_path, quiet=True)
    assert sorted(outcome.complete) == list(FILES)
    repeated = set(done) & before
    assert len(repeated) <= 1 + len(before) - 18 - len(kept)  # only what was found but not yet written
    assert tuple(tuned.read(tmp_path / FILES[1])) == tuned.BATCH_SIZES


def test_a_few_batch_sizes_are_kept_but_make_no_file(tmp_path):
    outcome = search([job for job in JOBS if job.tokens < 64], [0], quick, tmp_path, quiet=True)
    assert not outcome.complete
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.part" for name in FILES]
    outcome = search(JOBS, [0], quick, tmp_path, quiet=True)
    assert sorted(outcome.complete) == list(FILES)


def test_a_failed_batch_is_named_and_leaves_its_file_unfinished(tmp_path):
    def find(job: Job, worker: Any, stop: threading.Event) -> dict[str, Any]:
        if job == JOBS[3]:
            raise ValueError("no plan")
        return quick(job, worker, stop)

    outcome = search(JOBS, [0, 1], find, tmp_path, quiet=True)
    assert outcome.failures == {(FILES[0], tuned.BATCH_SIZES[3]): "ValueError: no plan"}
    assert sorted(outcome.complete) == list(FILES[1:])
    assert not (tmp_path / FILES[0]).exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    tuned.write(path, {1: {"us": 1.0}})
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuned.write(path, {1: {"us": 2.0}, 2: {"us": 2.0}})
    assert json.loads(path.read_text()) == {"1": {"us": 1.0}}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": {}}', '{"1": 3}', '{"0": {}}', '{"1": {'])
def test_a_broken_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="broken.json"):
        tuned.read(path)


def test_file_names_hold_no_separators():
    name = tuned.file_name("product", {"N": 6144, "K": 4096}, "int4 128x1 none", "NVIDIA H100/PCIe")
    assert name == "product,N=6144,K=4096,int4 128x1 none,NVIDIA_H100_PCIe.json"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 48, 128, 4096])
def test_searches_try_nothing_that_cannot_fit(name, tokens):
    weight = jax.eval_shape(lambda: random_weight(name, 1024, 1536))
    default = default_plan(weight, tokens)
    first = starts(weight, tokens, default)
    assert first
    assert fits(default, weight)
    for plan in first:
        for field in FIELDS:
            assert all(fits(other, weight) for other in neighbours(plan, field, weight))
    assert not fits(Plan("triton", Tile(128, 256, 128, stages=8)), weight)


def test_a_models_shapes_are_those_of_one_device_of_many():
    config = read_config(TINY / "qwen3")
    whole, half = shapes_of(config, 1), shapes_of(config, 2)
    assert len(whole) == len(half) == 4
    bytes_of = lambda shapes: sum(n * k for n, k in shapes)
    assert bytes_of(half) * 2 == bytes_of(whole)
    with pytest.raises(ValueError, match="--tp"):
        shapes_of(config, 64)


def test_decode_attention_takes_the_tiles_of_the_nearest_number_of_rows(tmp_path, monkeypatch):
    spec, dtype = AttentionSpec(8, 4, 128, 128**-0.5), jnp.dtype(jnp.bfloat16)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    name = attention.decode_file(spec, dtype, "some GPU")
    chosen = lambda rows, device: attention.tuned_decode_tiles(spec, dtype, dtype, rows, device)
    assert chosen(8, "another") == attention.decode_tiles(spec, dtype, dtype)
    tuned.write(tmp_path / name, {1: {"context": 16, "warps": 2, "stages": 4}, 64: {"context": 64}})
    assert chosen(8, "some GPU")[1:] == (16, 2, 4)
    with pytest.raises(ValueError, match="lacks context, warps or stages"):
        chosen(63, "some GPU")
    tried = tiles_to_try(spec)
    assert tried[0] == attention.decode_tiles(spec, dtype, dtype)
    assert 10 < len(tried) < 37


def test_random_weights_of_scripts_are_of_their_format():
    for name in FORMATS:
        weight = jax.eval_shape(lambda name=name: random_weight(name, 256, 512))
        assert kind_of(weight), name
        assert weight.inputs == 512
        assert weight.values.dtype in (jnp.uint8, jnp.int8, jnp.float8_e4m3fn)
