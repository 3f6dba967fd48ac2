"""Every example runs, and so does the notebook, from top to bottom."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import pathlib
import runpy
import subprocess
import sys
from types import ModuleType

import pytest

from tests.engine.server.conftest import serving

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
COVERED = {
    "offline_inference.py", "prefix_caching.py", "speculative_decoding.py", "batch.py", "streaming_client.py",
    "quire_colab.ipynb",
}  # fmt: skip


def load(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_example_is_left_out():
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} == COVERED


@pytest.mark.usefixtures("smollm2_gguf")
def test_prompts_are_answered_all_at_once(capsys):
    runpy.run_path(str(EXAMPLES / "offline_inference.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert shown.count("|") == 3
    assert "The capital of France is Paris." in shown


@pytest.mark.usefixtures("smollm2_gguf")
def test_a_prefix_that_is_cached_is_not_computed_again():
    assert load(EXAMPLES / "prefix_caching.py").main() <= 0.2


@pytest.mark.usefixtures("smollm2_gguf")
def test_speculation_changes_nothing_but_the_time(capsys):
    load(EXAMPLES / "speculative_decoding.py").main()
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.usefixtures("smollm2_gguf")
def test_a_batch_is_answered(capfd):
    load(EXAMPLES / "batch.py").main()
    shown = capfd.readouterr().out
    assert "France -> The capital of France is Paris." in shown
    assert "Japan -> The capital of Japan is Tokyo." in shown


def test_a_client_prints_tokens_as_they_come():
    with serving() as server:
        command = [sys.executable, str(EXAMPLES / "streaming_client.py"), server.url, "what?"]
        shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    assert shown.startswith("abcdefgh")


@pytest.mark.usefixtures("smollm2_gguf")
def test_the_notebook_runs_from_top_to_bottom_and_is_kept_without_outputs():
    cells = json.loads((EXAMPLES / "quire_colab.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    shown = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(shown):
        for cell in code:
            exec(compile("".join(cell["source"]), "cell", "exec"), names)
    assert "The capital of France is Paris." in shown.getvalue()
