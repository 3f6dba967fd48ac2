"""Compiled functions come back from disk as they were, and from nowhere else."""

from __future__ import annotations

import os
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from engine import executables
from engine.executables import ExecutableCache


class Counted:
    """Compiles x + a constant, another each time, so that JAX's cache has never seen it, and counts how often."""

    def __init__(self):
        self.count, self.constant = 0, random.SystemRandom().randrange(1 << 30)

    def __call__(self):
        self.count += 1
        self.constant += 1
        function = jax.jit(lambda tree: {"out": tree["x"] + self.constant}, donate_argnums=0)
        return function.lower({"x": jax.ShapeDtypeStruct((3,), jnp.int32)}).compile()


def get(cache: ExecutableCache, name: str, make: Counted):
    """-> the executable, saved as it is once a process is done compiling."""
    executable = cache.get(name, make)
    cache.save_new()
    return executable


def open_cache(root: Path | None, *identity: object) -> ExecutableCache:
    return ExecutableCache(root, jax.devices()[0], *identity)


def run(executable) -> list[int]:
    return executable({"x": jnp.arange(3, dtype=jnp.int32)})["out"].tolist()


def test_an_executable_is_compiled_once_and_then_read(tmp_path):
    make = Counted()
    for _ in range(3):  # each cache as a new process has it
        assert run(get(open_cache(tmp_path, "model"), "step", make)) == [make.constant + i for i in range(3)]
    assert make.count == 1


def test_another_identity_name_or_no_folder_is_another_executable(tmp_path):
    make = Counted()
    for cache, name in (
        (open_cache(tmp_path, "a"), "x"),
        (open_cache(tmp_path, "b"), "x"),
        (open_cache(tmp_path, "a"), "y"),
    ):
        get(cache, name, make)
    get(open_cache(None, "a"), "x", make)
    assert make.count == 4


def test_a_changed_source_is_another_identity(tmp_path, monkeypatch):
    before = open_cache(tmp_path).folder
    monkeypatch.setattr(executables, "_source_files", lambda root: [root / "README.md"])
    assert open_cache(tmp_path).folder != before


@pytest.mark.parametrize("damage", [b"", b"no pickle", None])
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    make = Counted()
    cache = open_cache(tmp_path)
    get(cache, "step", make)
    file = cache.folder / "step"
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    assert run(get(cache, "step", make))[0] == make.constant
    assert run(get(cache, "step", make))[0] == make.constant
    assert make.count == 2


@pytest.mark.skipif(os.getuid() != 0, reason="giving a file to somebody else needs root")
def test_another_users_file_is_not_read(tmp_path):
    make = Counted()
    cache = open_cache(tmp_path)
    get(cache, "step", make)
    os.chown(cache.folder / "step", 12345, 12345)
    get(cache, "step", make)
    assert make.count == 2


def test_a_number_is_computed_once_and_anew_if_its_file_holds_none(tmp_path):
    cache = open_cache(tmp_path)
    assert [cache.get_number("bytes", lambda value=value: value) for value in (5, 6)] == [5, 5]
    (cache.folder / "bytes").write_text("five")
    assert cache.get_number("bytes", lambda: 7) == 7


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path):
    (tmp_path / "file").write_text("")
    make = Counted()
    assert run(get(open_cache(tmp_path / "file"), "step", make))[0] == make.constant


def test_the_identities_used_longest_ago_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(executables, "KEPT", 2)
    caches = [open_cache(tmp_path, i) for i in range(4)]
    for age, cache in enumerate(caches):
        cache.get_number("n", lambda: 1)
        os.utime(cache.folder, (age, age))
    assert [cache.folder.exists() for cache in caches] == [False, False, True, True]
