"""Drafters with parameters of their own on meshes: the tokens are those of one device without drafts."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from tests.engine.processes import run_module
from tests.engine.speculation.test_generation import EAGLE3, SHAPE

MODEL = SHAPE | dict(num_hidden_layers=3, vocab_size=500, num_attention_heads=6, num_key_value_heads=3, head_dim=16)
HEAD = EAGLE3 | dict(vocab_size=500, draft_vocab_size=300, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 3]})
MESH = dict(tensor_parallel_size=2, pipeline_parallel_size=2)


def settings(folder: pathlib.Path, method: str, rows: int, **mesh: int) -> dict[str, Any]:
    """-> of an engine whose model, and what drafts for it, have random weights."""
    for name, shape in {"model": MODEL, "draft_model": MODEL, "eagle3": HEAD}.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(shape))
    drafts = dict(method=method, model=str(folder / method), num_speculative_tokens=2, adaptive=False)
    return dict(
        model=str(folder / "model"), load_format="dummy", speculative_config=drafts, max_num_seqs=rows, **mesh
    )  # fmt: skip


def test_drafts_are_as_right_on_a_mesh_as_on_one_device(tmp_path: pathlib.Path):
    # What has pages of its own, with rows side by side; and what reads all stages, whose steps take long to compile.
    methods = {"draft_model": 2, "eagle3": 1}
    cases = [settings(tmp_path, method, rows, **mesh) for method, rows in methods.items() for mesh in ({}, MESH)]
    found = run_module("tests.engine.weights.mesh_program", given=[{"settings": case} for case in cases])
    for method, one, other in zip(methods, found[::2], found[1::2], strict=True):
        assert other == one, method
        assert one[1] > 0, method
