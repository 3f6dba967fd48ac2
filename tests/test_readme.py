"""What README.md shows works: its Python blocks run, and the scripts and modules that its shell blocks name exist.

A block marked `python` must run by itself; one that needs more, such as a running server, is marked `py`.
"""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    """-> the README's fenced blocks of one language."""
    text = README.read_text() if README.exists() else ""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_its_python_blocks_run(smollm2_gguf):
    if not blocks("python"):
        pytest.skip("README.md has no Python block yet")
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=ROOT, check=True, timeout=300)


def test_its_other_python_blocks_are_python():
    for block in blocks("py"):
        ast.parse(block)


def test_what_its_shell_blocks_name_exists():
    shell = "\n".join(blocks("bash") + blocks("sh") + blocks("shell"))
    if not shell:
        pytest.skip("README.md has no shell block yet")
    for script in re.findall(r"\bscripts/[\w./-]+", shell):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"\bpython3? -m ((?:engine|kernels|sharding)[\w.]*)", shell):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
