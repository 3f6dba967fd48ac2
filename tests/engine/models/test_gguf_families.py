"""The same weights as a folder and as a GGUF file are the same model: names, permutations, offsets, metadata."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace

import jax
import numpy as np
import pytest

from engine.models.config import ModelConfig
from engine.models.read import from_gguf
from engine.models.rope import frequencies
from engine.weights.load import load_params, open_checkpoint
from tests.engine.models.gguf_files import ARCHITECTURES, write_gguf

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny"
FOLDERS = [
    path.parent
    for path in sorted(TINY.glob("*/config.json"))
    if json.loads(path.read_text())["architectures"][0] in ARCHITECTURES
]


SHARED_ARCHITECTURES = {"mixtral": "llama", "deepseek_v3": "deepseek_v2"}  # whose GGUF files have another family's


def assert_same_model(a: ModelConfig, b: ModelConfig) -> None:
    """Equal but for what a GGUF file rounds to float32, and for how rope scaling is said."""
    name = lambda c: SHARED_ARCHITECTURES.get(c.family, c.family)
    plain = lambda c: replace(c, family=name(c), norm_eps=0, attention_scale=None, layers=())
    assert plain(a) == plain(b)
    assert a.norm_eps == pytest.approx(b.norm_eps)
    for one, other in zip(a.layers, b.layers, strict=True):
        assert replace(one, rope=None) == replace(other, rope=None)
        assert (one.rope is None) == (other.rope is None)
        if one.rope and other.rope:
            assert one.rope.attention_factor == pytest.approx(other.rope.attention_factor)
            for length in (16, 256):
                np.testing.assert_allclose(frequencies(one.rope, length), frequencies(other.rope, length), rtol=1e-6)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_and_its_gguf_file_are_the_same_model(tmp_path: pathlib.Path, folder: pathlib.Path):
    ours, theirs = open_checkpoint(folder), open_checkpoint(write_gguf(folder, tmp_path / "model.gguf"))
    assert_same_model(ours.config, theirs.config)
    if folder.name != "gemma2":  # its file does not say the scale: see the test below
        assert ours.config.attention_scale == pytest.approx(theirs.config.attention_scale)
    jax.tree.map(np.testing.assert_array_equal, load_params(ours, "float32"), load_params(theirs, "float32"))


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_older_files_with_fused_projections_of_the_latent_are_the_same_model(tmp_path: pathlib.Path, name: str):
    ours = open_checkpoint(TINY / name)
    theirs = open_checkpoint(write_gguf(TINY / name, tmp_path / "model.gguf", fused_latent=True))
    assert_same_model(ours.config, theirs.config)
    jax.tree.map(np.testing.assert_array_equal, load_params(ours, "float32"), load_params(theirs, "float32"))


def metadata(architecture: str, **values) -> dict:
    sizes = {
        "block_count": 26, "embedding_length": 4608, "feed_forward_length": 48, "context_length": 8192,
        "attention.head_count": 32, "attention.key_length": 128, "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    return {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in (sizes | values).items()}


@pytest.mark.parametrize(
    ("architecture", "layers", "width"),
    [("gemma2", 26, 128), ("gemma2", 46, 144), ("gemma3", 34, 128), ("gemma3", 62, 168)],
)
def test_gemmas_attention_scale_is_known_by_the_number_of_layers(architecture: str, layers: int, width: int):
    _, config = from_gguf(
        "x.gguf", metadata(architecture, block_count=layers), {"token_embd.weight": (60, 4608)}, np.zeros
    )
    assert config.attention_scale == width**-0.5


@pytest.mark.parametrize(
    ("architecture", "values", "windows"),
    [
        ("gemma2", {}, [4096, None, 4096, None, 4096, None, 4096]),  # what llama.cpp takes for granted
        ("gemma3", {}, [None] * 7),
        ("gemma3", {"attention.sliding_window": 512}, [512] * 5 + [None, 512]),
        (
            "gemma3",
            {"attention.sliding_window": 512, "attention.sliding_window_pattern": 3},
            [512, 512, None] * 2 + [512],
        ),
        ("phi3", {"attention.sliding_window": 512}, [512] * 7),
        ("phi3", {"attention.sliding_window": 0}, [None] * 7),
    ],
)
def test_windows_are_where_the_file_or_the_family_has_them(architecture: str, values: dict, windows: list[int | None]):
    _, config = from_gguf(
        "x.gguf", metadata(architecture, block_count=7, **values), {"token_embd.weight": (60, 4608)}, np.zeros
    )
    assert [layer.window for layer in config.layers] == windows
