"""Loading onto several devices: each gets its shard, and of the files only the shards' bytes are read."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from engine.weights.load import load_params, open_checkpoint
from engine.weights.part import Part
from engine.weights.place import place
from tests.engine.weights.test_load import CONFIG, save_folder, weights

ROOT = pathlib.Path(__file__).parents[3]

# Loads a folder four ways over 8 devices as (2, 4); prints for each the bytes read and whether all values are right.
# Then converts it and restores it the last of these ways.
PROGRAM = """
import json, os, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from engine.convert import convert
from engine.models.placement import whole as placed_whole
from engine.weights.load import load_params, open_checkpoint

count = 0
def preadv(descriptor, pieces, offset, original=os.preadv):
    global count
    done = original(descriptor, pieces, offset)
    count += done
    return done
os.preadv = preadv

mesh = jax.make_mesh((2, 4), ("data", "model"))
rules = {
    "replicated": lambda spec: {}, "data": lambda spec: {"embed": "data"},
    "heads": lambda spec: {"kv_heads": "data", "mlp": "model", "vocab": "model"},
}
answers = {}
checkpoint = open_checkpoint(Path(sys.argv[1]))
whole = load_params(checkpoint, "float32")
for name, rule in rules.items():
    def sharding(path, spec):
        return NamedSharding(mesh, PartitionSpec(*(rule(spec).get(axis) for axis in spec.axes)))
    count = 0
    params = load_params(checkpoint, "float32", placed_whole(checkpoint.config, sharding))
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), params, whole)
    placed = jax.tree.map(lambda a: len(a.sharding.device_set) == 8, params)
    answers[name] = [count, all(jax.tree.leaves(same)) and all(jax.tree.leaves(placed))]

convert(sys.argv[1], Path(sys.argv[2]), "float32")
restored = load_params(open_checkpoint(Path(sys.argv[2])), "float32", placed_whole(checkpoint.config, sharding))
same = jax.tree.map(lambda a, b: a.sharding == b.sharding and np.array_equal(a, b), restored, params)
answers["restored"] = all(jax.tree.leaves(same))

class OneColumn:
    # A sharding of which only two of the devices are this process's: they hold a quarter of what is split.
    def __init__(self, path, spec):
        split = {"mlp": "model", "vocab": "model"}
        self.inner = NamedSharding(mesh, PartitionSpec(*(split.get(axis) for axis in spec.axes)))

    def addressable_devices_indices_map(self, shape):
        everywhere = self.inner.addressable_devices_indices_map(shape)
        return {device: everywhere[device] for device in mesh.devices[:, 1]}

jax.make_array_from_single_device_arrays = lambda shape, sharding, arrays: arrays[0]  # nobody has the other shards
count = 0
load_params(checkpoint, "float32", placed_whole(checkpoint.config, OneColumn))
answers["one column"] = [count, True]
print(json.dumps(answers))
"""


def test_each_host_reads_only_the_bytes_of_its_own_shards(tmp_path):
    config = CONFIG | {"num_key_value_heads": 2}
    tensors = weights(config)
    folder = save_folder(tmp_path / "folder", config, tensors)
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "converted")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    answers = json.loads(done.stdout)
    everything = sum(tensor.nbytes for tensor in tensors.values())
    assert [answers[name] for name in ("replicated", "data", "heads")] == [[everything, True]] * 3
    assert answers["restored"]
    split = sum(t.nbytes for name, t in tensors.items() if "mlp" in name or "embed" in name or "lm_head" in name)
    assert answers["one column"] == [everything - split + split // 4, True]


SHAPE, VIEW, BLOCK = (24, 10), (3, 2, 2, 2, 10), (10, 3, 2, 4)  # [K * n * H, D]; pairs of H apart; [D, K, n, H]
PAIRED = Part("q", SHAPE, VIEW, (4, 0, 1, 3, 2), BLOCK, (slice(None), slice(None), slice(0, 2)))


@pytest.mark.parametrize(
    ("part", "parameter"),
    [
        (PAIRED, (10, 3, 5, 4)),
        (Part("a", (12, 8), (12, 8), (1, 0), (8, 12)), (8, 12)),
        (Part("a", (12, 8), (12, 1, 8), (2, 1, 0), (8, 1, 12), (slice(None), slice(1, 2))), (8, 2, 12)),
        (Part("a", (20, 8), (12, 8), (1, 0), (8, 12), rows=(4, 16)), (8, 12)),
        (Part("a", (12, 8), (3, 4, 8), (2, 0, 1), (8, 3, 3), take=(slice(None), slice(1, 4))), (8, 3, 3)),
        (Part("a", (12, 8), (3, 4, 8), (0, 1, 2), (12, 8)), (12, 8)),
        (Part("a", (12, 8), (96,), (0,), (3, 4, 8)), (3, 4, 8)),
    ],
)
def test_every_shard_is_the_slice_of_the_whole(part: Part, parameter: tuple[int, ...]):
    tensor = np.arange(np.prod(part.shape)).reshape(part.shape)
    whole = np.full(parameter, -1)
    rows = tensor if part.rows is None else tensor[slice(*part.rows)]
    whole[part.at] = rows.reshape(part.view)[part.take].transpose(part.order).reshape(part.block)
    shards = [[(0, n)] + [(i, n) for i in range(n)] if n < 5 else [(0, n), (n // 2, n)] for n in parameter]
    tried = 0
    for bounds in np.ndindex(*map(len, shards)):
        low, high = zip(*(shards[axis][i] for axis, i in enumerate(bounds)), strict=True)
        shard = np.full([b - a for a, b in zip(low, high, strict=True)], -1)
        try:
            placement = place(part, shard, low)
        except ValueError as error:
            assert "cuts through axes" in str(error) or "copy" in str(error)
            continue
        tried += 1
        if placement is not None:
            stored = tensor.reshape(-1)[placement.base : placement.base + np.prod(placement.view)]
            window = tuple(slice(*span) for span in placement.ranges)
            placement.out[...] = stored.reshape(placement.view)[window]
        np.testing.assert_array_equal(shard, whole[tuple(map(slice, low, high))])
    assert tried >= 2


def test_a_file_that_has_become_shorter_is_named(tmp_path):
    folder = save_folder(tmp_path / "folder", CONFIG, weights(CONFIG))
    checkpoint = open_checkpoint(folder)
    checkpoint.load("model.norm.weight")
    os.truncate(folder / "model.safetensors", 3000)
    with pytest.raises(ValueError, match=r"model.safetensors: ends at byte \d+; it was longer when it was opened"):
        load_params(checkpoint, "float32")
