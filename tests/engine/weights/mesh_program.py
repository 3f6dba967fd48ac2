"""Run by tests in a process with 8 CPU devices: models in few bits, and models that draft, on meshes of several.

It reads a JSON list of cases from standard input and prints a list of what came of them. A case is an object: with
`settings` of an LLM the tokens that it generates, and how many drafts were right; else whether the weights of `model`
that stay as they are stored on a mesh of `stages` x `devices` stand on each device for what expanded ones are there:
null, or what is wrong.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

PROMPTS = [[7, 8, 9, 7, 8, 9, 7], list(range(20)), [5], [3, 1] * 12]


def tokens(settings: dict[str, Any]) -> tuple[list[list[int]], int]:
    from engine import LLM, SamplingParams
    from tests.engine.buckets import few_buckets

    sizes: dict[str, Any] = dict(
        skip_tokenizer_init=True, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64, block_size=16,
        num_gpu_blocks_override=12,
    )  # fmt: skip
    with few_buckets() if "speculative_config" in settings else nullcontext():  # decodes of packed weights are apart
        llm = LLM(**sizes | settings)
    wishes = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False),
        SamplingParams(temperature=0.8, seed=3, max_tokens=6, ignore_eos=True, detokenize=False),
    ]
    given: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    found = [output.outputs[0].token_ids for wish in wishes for output in llm.generate(given, wish, use_tqdm=False)]
    stats = llm.get_metrics().speculation
    assert stats is None or stats.num_draft_tokens > 0
    return found, stats.num_accepted_tokens if stats else 0


def check(model: str, stages: int, devices: int, method: str | None) -> str | None:
    from engine.models.narrow import INPUTS
    from engine.models.narrow_placement import Narrow, Pieces, map_stored, stored_as
    from engine.models.placement import on_mesh
    from engine.weights.load import load_params, open_checkpoint, quantization_of
    from kernels.quantized import QuantizedTensor, dequantize
    from sharding.mesh import replica_meshes

    checkpoint = open_checkpoint(Path(model))
    (mesh,) = replica_meshes(jax.devices(), devices, stages)
    how = quantization_of(checkpoint, method or checkpoint.method, "cpu", "float32")
    placed = on_mesh(checkpoint.config, mesh)
    wide = load_params(checkpoint, "float32", placed)
    kept = load_params(checkpoint, "float32", placed, how)
    stored = stored_as(placed, how.plan)
    count = 0

    def shards(array: jax.Array) -> list[np.ndarray]:
        return [np.asarray(shard.data) for shard in sorted(array.addressable_shards, key=lambda s: s.device.id)]

    def seen(node: Any, weight: Any) -> list[np.ndarray]:
        """-> what each device's part of the weight stands for, as the model sees it."""
        nonlocal count
        if isinstance(node, Pieces):
            axis = node.how.axis + int(
                node.pieces[0].wide.stacked if isinstance(node.pieces[0], Narrow) else stages > 1
            )
            each = [seen(piece, own) for piece, own in zip(node.pieces, weight.pieces, strict=True)]
            return [np.concatenate(parts, axis=axis) for parts in zip(*each, strict=True)]
        if not isinstance(node, Narrow):
            return shards(weight)
        count += 1
        names = [array.name for array in node.arrays]
        found, lead = [], int(node.wide.stacked)
        for own in zip(*(shards(getattr(weight, name)) for name in names), strict=True):
            flat = np.asarray(
                dequantize(QuantizedTensor(node.storage.layout, **dict(zip(names, own, strict=True))), "float32")
            )
            shape = node.wide.sharding.shard_shape(node.wide.shape)  # type: ignore[union-attr]
            inputs = [axis + lead for axis in INPUTS[node.parameter]]
            outputs = [axis for axis in range(len(shape)) if axis not in inputs]
            apart = flat.reshape(*(shape[i] for i in outputs), *(shape[i] for i in inputs))
            found.append(apart.transpose(np.argsort([*outputs, *inputs])))
        return found

    wrong: list[str] = []

    def compare(node: Any, weight: Any, other: Any) -> None:
        for device, (ours, theirs) in enumerate(zip(seen(node, weight), shards(other), strict=True)):
            if not np.allclose(ours, theirs, rtol=1e-6, atol=1e-7 * np.abs(theirs).max()):
                wrong.append(f"{node} on device {device}: {np.abs(ours - theirs).max()}")

    nodes, leaves = [], []
    map_stored(nodes.append, stored)
    is_leaf = lambda x: hasattr(x, "layout") or hasattr(x, "pieces")
    leaves = jax.tree.leaves(kept, is_leaf=is_leaf)
    for node, weight, other in zip(nodes, leaves, jax.tree.leaves(wide), strict=True):
        compare(node, weight, other)
    assert count > 0, "nothing was kept in few bits"
    return wrong[0][:500] if wrong else None


def one(case: dict[str, Any]) -> Any:
    try:
        return tokens(case["settings"]) if "settings" in case else check(**case)
    except ValueError as error:
        return f"ValueError: {error}"


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.devices()  # before an engine asks for fewer
    json.dump([one(case) for case in json.load(sys.stdin)], sys.stdout)
