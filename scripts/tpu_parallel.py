"""Large models on TPU slices, compiled ahead of time: whether they fit, and every collective against what must be sent.

python scripts/tpu_parallel.py [--case llama-70b-v5e-4x4] [--layers 80] [--out parallel.json]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from collectives import collectives, turns
from jax.experimental import topologies
from tpu_steps import LENGTH, PAGE, PAGES, StepShape, compile_step, from_hugging_face

from engine.bench.shapes import SHAPES
from engine.layout import StepLayout
from engine.models.config import ModelConfig
from sharding.mesh import replica_meshes

GIB = 1 << 30
LARGE: dict[str, dict[str, Any]] = {
    "llama-70b": SHAPES["llama-8b"]
    | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "qwen3-30b-a3b": dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, vocab_size=151936, rms_norm_eps=1e-6,
        rope_theta=1000000.0, max_position_embeddings=40960, tie_word_embeddings=False, hidden_act="silu",
        torch_dtype="bfloat16", bos_token_id=151643, eos_token_id=151645, attention_bias=False, decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
}  # fmt: skip


class Case(NamedTuple):
    model: str
    topology: str
    stages: int
    memory: int  # bytes of HBM of a device
    experts: bool = False


CASES = {
    "llama-70b-v5e-4x4": Case("llama-70b", "v5e:4x4", 1, 16 * GIB),
    "llama-70b-v6e-2x4": Case("llama-70b", "v6e:2x4", 1, 32 * GIB),
    "llama-70b-v5e-8x8": Case("llama-70b", "v5e:8x8", 8, 16 * GIB),
    "qwen3-30b-a3b-v6e-2x4": Case("qwen3-30b-a3b", "v6e:2x4", 1, 32 * GIB, experts=True),
}
STEPS = {"decode": StepShape(256, 256, True), "prefill": StepShape(256, 2048, True)}


def least(config: ModelConfig, shape: StepShape, stages: int, devices: int, micro: int) -> int:
    """-> bytes that collectives must carry: what one device puts into them, or gets.

    Each layer sums two partial results, the embedding one, of every token; a pipeline hands each micro-batch on and
    tells all stages the last one's hidden states of the rows that sample; and logits are exchanged once.
    """
    tokens, hidden = shape.tokens // micro, config.hidden_size * 2
    turns, layers = micro + stages - 1, math.ceil(len(config.layers) / stages)
    total = 2 * layers * turns * tokens * hidden + shape.tokens * hidden
    total += (turns * tokens * hidden + shape.rows * hidden) * (stages > 1)
    world = stages * devices
    return total + shape.rows * math.ceil(config.vocab_size / world) * 4 + shape.rows * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--layers", type=int, help="fewer, to compile in less time")
    parser.add_argument("--text", type=Path, help="where to put the compiled step")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for name, case in CASES.items():
        if options.case not in (None, name):
            continue
        topology = topologies.get_topology_desc(platform="tpu", topology_name=case.topology)
        devices = len(topology.devices) // case.stages
        (mesh,) = replica_meshes(topology.devices, devices, case.stages)
        _, config = from_hugging_face(case.model, LARGE[case.model])
        config = replace(config, layers=config.layers[: options.layers])
        for step, shape in STEPS.items():
            if options.step not in (None, step):
                continue
            micro = StepLayout(config, mesh, case.experts).step_axes(shape).micro_batches
            compiled, seconds = compile_step(config, mesh, shape, case.experts)
            text, memory = compiled.as_text(), compiled.memory_analysis()
            if options.text:
                options.text.write_text(text)
            found, rounds = collectives(text), turns(text)
            sent = sum(one.bytes * count for one, count in found.items())
            must = least(config, shape, case.stages, devices, micro)
            row = dict(
                layers=len(config.layers), tensor_parallel=devices, pipeline_parallel=case.stages, micro_batches=micro,
                compile_s=round(seconds), arguments_gib=round(memory.argument_size_in_bytes / GIB, 2),
                temporaries_gib=round(memory.temp_size_in_bytes / GIB, 2),
                in_place_gib=round(memory.alias_size_in_bytes / GIB, 2),
                fits=memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.9 * case.memory,
                kv_tokens=(PAGES - 1) * PAGE, longest=LENGTH,
                collectives={" ".join(one): count for one, count in found.items()},
                turns=rounds, idle=f"{1 - micro / rounds:.1%}",
                collective_mib=round(sent / 2**20, 1), least_mib=round(must / 2**20, 1), more=f"{sent / must - 1:+.1%}",
            )  # fmt: skip
            table[f"{name} {step}"] = row
            print(name, step, json.dumps(row), flush=True)
            if options.out:
                options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
