"""Parameters on a mesh: what is padded, copied or stacked, and that every box of the model is where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from engine.models.params import map_specs, param_specs
from engine.models.placement import Placed, map_placed, on_mesh, stage_layers
from engine.weights.load import read_config
from sharding.heads import split_heads

TINY = Path(__file__).parents[2] / "data" / "tiny"


def placed_on(folder: str, stages: int, devices: int, expert_parallel: bool = False) -> dict:
    mesh = AbstractMesh((stages, devices), ("stage", "model"))
    return on_mesh(read_config(TINY / folder), mesh, expert_parallel)  # pyright: ignore[reportArgumentType]


def filled(placed: Placed, parameters: dict, corner: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """-> a shard, by its pieces."""
    out = np.zeros(shape)
    for path, start, at in placed.pieces(corner, shape):
        target = out[at][0] if placed.stacked else out[at]
        box = tuple(slice(a, a + n) for a, n in zip(start, target.shape, strict=True))
        target[...] = parameters[path][box]
    return out


def test_layers_are_spread_evenly_and_the_first_stages_have_one_more():
    assert stage_layers(range(4), 2) == [[0, 2], [1, 3]]  # pyright: ignore[reportArgumentType]
    assert stage_layers(range(7), 4) == [[0, 2, 4, 6], [1, 3, 5, None]]  # pyright: ignore[reportArgumentType]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="pipeline_parallel_size: 4 stages are more than the model's 3 layers"):
        placed_on("llama3", 4, 1)


@pytest.mark.parametrize(("stages", "devices"), [(1, 2), (1, 8), (2, 1), (2, 4)])
@pytest.mark.parametrize("folder", ["gpt-oss", "olmo2", "deepseek-v2"])
def test_every_shard_is_the_slice_of_the_whole_and_nothing_is_lost(folder: str, stages: int, devices: int):
    parameters: dict = {}

    def number(path: tuple, spec) -> None:
        parameters[path] = 1 + np.arange(np.prod(spec.shape)).reshape(spec.shape)

    map_specs(number, param_specs(read_config(TINY / folder)))
    seen = set()

    def check(placed: Placed) -> None:
        whole = filled(placed, parameters, (0,) * len(placed.shape), placed.shape)
        sources = [path for path in placed.sources if path is not None]
        for path in sources:
            assert set(np.unique(parameters[path])) <= set(np.unique(whole)), path
            seen.add(path)
        local = placed.sharding.shard_shape(placed.shape)  # pyright: ignore[reportOptionalMemberAccess]
        for index in np.ndindex(*(a // b for a, b in zip(placed.shape, local, strict=True))):
            corner = tuple(i * n for i, n in zip(index, local, strict=True))
            shard = filled(placed, parameters, corner, local)
            box = tuple(slice(a, a + n) for a, n in zip(corner, local, strict=True))
            np.testing.assert_array_equal(shard, whole[box])

    map_placed(check, placed_on(folder, stages, devices))
    assert seen == set(parameters)


def test_copies_of_a_kv_head_share_its_queries_and_padding_is_zero():
    heads = split_heads(3, 3, 8)  # 8 heads of 2 queries: two copies of each of 3, and 2 of padding
    spec = param_specs(read_config(TINY / "llama3"))["layers"][0]["qkv"]
    spec = type(spec)((1, 3, 5, 1), spec.axes)
    placed = Placed(spec, (1, 8, 4, 1), (("qkv",),), None, False, heads)
    named = np.array([[[10 * k + i for i in range(1, 6)]] for k in range(1, 4)]).reshape(1, 3, 5, 1)
    assert filled(placed, {("qkv",): named}, (0, 0, 0, 0), (1, 8, 4, 1))[0, :, :, 0].tolist() == [
        [11, 12, 14, 15], [13, 0, 14, 15], [21, 22, 24, 25], [23, 0, 24, 25],
        [31, 32, 34, 35], [33, 0, 34, 35], [0, 0, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip


def test_routers_keep_the_models_experts_while_the_experts_are_padded():
    layer = placed_on("mixtral", 1, 4, expert_parallel=True)["layers"][0]
    assert layer["experts_down"].shape[0] == 8
    assert layer["router"].shape[1] == 6
