"""Whole steps of a named model with the TPU backend, compiled ahead of time: memory, and what XLA adds.

python scripts/tpu_steps.py [--shape llama-8b] [--generation v6e] [--tensor-parallel 8] [--layers 32] [--out steps.json]
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpu_compiler import GENERATIONS, compile_for, mesh_of, prepare

prepare()

import jax  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from engine.bench.shapes import SHAPES  # noqa: E402
from engine.layout import StepLayout  # noqa: E402
from engine.models.config import ModelConfig  # noqa: E402
from engine.models.read import from_hugging_face  # noqa: E402
from engine.step_input import StepShape  # noqa: E402
from kernels.attention import BACKENDS  # noqa: E402
from sharding.mesh import replica_meshes  # noqa: E402

PAGE, LENGTH, PAGES = 128, 2048, 513
STEPS = {"decode of 256": StepShape(256, 256), "prefill of 2048": StepShape(8, 2048)}
MOVES = ("copy", "transpose", "pad", "reshape")


def compile_step(
    config: ModelConfig, mesh: Mesh, shape: StepShape, expert_parallel: bool = False,
    options: dict[str, Any] | None = None,
) -> tuple[Any, float]:  # fmt: skip
    """-> the executable of a step on a mesh (stage, model), and the seconds it took. `options`: the compiler's."""
    layout, backend = StepLayout(config, mesh, expert_parallel), BACKENDS["tpu"]
    state = layout.state(backend, PAGES, PAGE, ("bfloat16", "bfloat16"), 256, LENGTH)
    run = jax.jit(StepLayout.step, static_argnums=(0, 1, 2, 3), donate_argnums=5)
    arguments = layout.params("bfloat16"), state, layout.flat(shape)
    return compile_for(mesh, run, (layout, backend, PAGE, shape), arguments, options)


def moved_operands(text: str) -> dict[str, str]:
    """-> the operations of the compiled text that only move what goes into the attention kernel, by their name."""
    defined = dict(re.findall(r"^\s*(?:ROOT )?%([\w.-]+) = (.*)$", text, re.MULTILINE))
    found = {}
    for definition in defined.values():
        call = re.search(r'custom-call\((.*?)\), custom_call_target="tpu_custom_call"', definition)
        for operand in re.findall(r"%([\w.-]+)", call[1]) if call else ():
            what = re.match(r"(\S+) ([\w-]+)\(", defined.get(operand, ""))
            if what and what[2] in MOVES:
                found[operand] = what[1]
    return found


def moved_weights(text: str) -> list[str]:
    """-> the operations of the compiled text that put a weight into HBM once more, maybe with its axes reordered."""
    entry = text[text.index("\nENTRY") :]
    kind = lambda dtype, shape: (dtype, *sorted(shape.split(",")))
    weights = {kind(*found) for found in re.findall(r"%params\S* = (\w+)\[(\d+,[\d,]+)\]", entry)}
    moves = re.findall(r"%([\w.-]+) = (\w+)\[([\d,]+)\](\S*) (?:copy|fusion|reshape|transpose)\(", entry)
    return [name for name, dtype, shape, layout in moves if kind(dtype, shape) in weights and "S(1)" not in layout]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--generation", choices=GENERATIONS, default="v6e")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="devices that share each layer")
    parser.add_argument("--text", type=Path, help="where to put the compiled steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    size = options.tensor_parallel
    (mesh,) = replica_meshes(list(mesh_of(options.generation, size).devices), size)
    _, config = from_hugging_face(options.shape, SHAPES[options.shape])
    config = replace(config, layers=config.layers[: options.layers])
    for name, shape in STEPS.items():
        compiled, seconds = compile_step(config, mesh, shape)
        memory, text = compiled.memory_analysis(), compiled.as_text()
        if options.text:
            options.text.with_suffix(f".{shape.tokens}.txt").write_text(text)
        row = dict(
            compile_s=round(seconds, 1), temporaries_mib=round(memory.temp_size_in_bytes / 2**20, 1),
            aliased_mib=round(memory.alias_size_in_bytes / 2**20, 1), moved_for_attention=moved_operands(text),
            moved_weights=moved_weights(text),
        )  # fmt: skip
        devices = f"TP {options.tensor_parallel}, " if options.tensor_parallel > 1 else ""
        title = f"{options.generation} {options.shape} {options.layers} layers, {devices}{name}"
        table[title] = row
        print(title, row, flush=True)
        if options.out:
            options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
