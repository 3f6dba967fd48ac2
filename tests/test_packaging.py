"""The wheel holds the three packages with their data, and nothing else that could be imported."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = {"engine", "kernels", "sharding"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built offline from a copy of the tree, which has tuned block sizes even if the project has none yet."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for entry in ROOT.iterdir():
        if entry.is_file():
            shutil.copy(entry, source)
        elif not entry.name.startswith("."):
            shutil.copytree(entry, source / entry.name, ignore=ignore)
    (source / "kernels" / "tuned").mkdir(exist_ok=True)
    (source / "kernels" / "tuned" / "a_device.json").write_text("{}")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", source / "dist", source], check=True, timeout=120)
    (path,) = (source / "dist").iterdir()
    return zipfile.ZipFile(path)


def test_the_wheel_holds_exactly_the_three_packages(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES


def test_the_wheel_holds_every_module_and_data_file(wheel):
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.*") if path.suffix != ".pyc"]
    assert {str(path.relative_to(ROOT)) for path in paths} <= set(wheel.namelist())
    assert "kernels/tuned/a_device.json" in wheel.namelist()


def test_the_metadata_names_licence_and_extras(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode().splitlines()
    assert {"Name: quire", "License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(metadata)
    assert {"Provides-Extra: tpu", "Provides-Extra: cuda", "Provides-Extra: dev"} <= set(metadata)
    assert not [line for line in metadata if line.startswith("Requires-Dist: torch")]
