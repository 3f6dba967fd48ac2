"""Experts and latent attention shard: a device's part of a parameter comes from the files as its part of the whole."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from engine.weights.assemble import Recipe, recipes
from engine.weights.load import Checkpoint, open_checkpoint
from engine.weights.place import place
from engine.weights.stream import Streamer
from tests.engine.models.gguf_files import write_gguf

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny"
SPLIT = {"experts", "heads", "kv_heads", "mlp", "vocab"}  # what meshes split


def part_of(checkpoint: Checkpoint, recipe: Recipe, corner: list[int], shape: list[int]) -> np.ndarray:
    """-> parameter[corner[0] : corner[0] + shape[0], ...] from the checkpoint's tensors."""
    shard = np.full(shape, np.nan, np.float32)
    with Streamer(threads=1) as streamer:
        placed = [(part, place(part, shard, corner)) for part in recipe.parts]
        streamer.fill([(checkpoint.tensors[part.tensor], placement) for part, placement in placed if placement])
    return shard


@pytest.mark.parametrize("gguf", [False, True], ids=["folder", "gguf"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "deepseek-v2", "deepseek-v3"])
def test_a_shard_is_its_part_of_the_whole(tmp_path: pathlib.Path, name: str, gguf: bool):
    folder = TINY / name
    checkpoint = open_checkpoint(write_gguf(folder, tmp_path / "model.gguf") if gguf else folder)
    assert isinstance(checkpoint, Checkpoint)
    split = set()
    for recipe in recipes(checkpoint.config, checkpoint.family, checkpoint.style):
        if recipe.path[:2] != ("layers", len(checkpoint.config.layers) - 1):
            continue
        shape = list(recipe.spec.shape)
        whole = part_of(checkpoint, recipe, [0] * len(shape), shape)
        assert np.isfinite(whole).all()
        for axis in (axis for axis, logical in enumerate(recipe.spec.axes) if logical in SPLIT):
            split.add(recipe.spec.axes[axis])
            half = [*shape[:axis], shape[axis] // 2, *shape[axis + 1 :]]
            corner = [0] * axis + [half[axis]] + [0] * (len(shape) - axis - 1)
            expected = whole.take(range(half[axis], shape[axis]), axis)
            np.testing.assert_array_equal(part_of(checkpoint, recipe, corner, half), expected)
    assert {"experts", "mlp"} < split
