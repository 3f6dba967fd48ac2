"""Run by tests in a process with 8 CPU devices: compiles a step for meshes and prints what its text tells.

python -m tests.engine.collectives_program [LAYERS,TOKENS,TPxPP]... prints a JSON list.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from collectives import collectives, turns
from jax.sharding import PartitionSpec

from engine.layout import StepLayout
from engine.models.pipeline import MOST
from engine.step_input import StepShape
from engine.weights.load import read_config
from kernels.attention import BACKENDS
from sharding.mesh import replica_meshes
from sharding.pipeline import rotate

TINY = Path(__file__).parents[1] / "data" / "tiny" / "llama3"
ROWS, PAGE, PAGES, LENGTH = 4, 16, 8, 64
HALF = 64  # tokens from which on devices of one stage compute a half while they add up another


def step_of(
    layers: int, tokens: int, mesh: str, custom_all_reduce: bool = False
) -> tuple[StepLayout, Any, tuple[Any, ...]]:
    """-> a step's layout, the step, and what it takes."""
    tensor, pipeline = map(int, mesh.split("x"))
    config = read_config(TINY)
    config = replace(config, layers=config.layers[:1] * layers)
    layout = StepLayout(config, replica_meshes(jax.devices(), tensor, pipeline)[0], custom_all_reduce=custom_all_reduce)
    backend, shape = BACKENDS["xla"], StepShape(ROWS, tokens, plain=True)
    state = layout.state(backend, PAGES, PAGE, ("float32", "float32"), ROWS, LENGTH)
    run = jax.jit(StepLayout.step, static_argnums=(0, 1, 2, 3), donate_argnums=5)
    return layout, run, (layout, backend, PAGE, shape, layout.params("float32"), state, layout.flat(shape))


def compiled(layers: int, tokens: int, mesh: str) -> dict[str, Any]:
    layout, run, arguments = step_of(layers, tokens, mesh)
    text = run.lower(*arguments).compile().as_text()
    found = [[*collective, count] for collective, count in collectives(text).items()]
    return {"collectives": found, "turns": turns(text), "busy": busy(layout.axes.stage.size, layout)}


def linked(layers: int, tokens: int, mesh: str) -> dict[str, int]:
    """-> how often a step of GPUs that reach each other's memory has a kernel, which are sums alone, and a psum."""
    with mock.patch("engine.layout.has_link", lambda mesh: True):
        _, run, arguments = step_of(layers, tokens, mesh, custom_all_reduce=True)
        names = Counter(primitives(run.trace(*arguments).jaxpr.jaxpr))
    return {"kernels": names["pallas_call"], "psums": names["psum"]}


def primitives(jaxpr: Any) -> Iterator[str]:
    """Yields the name of everything that a program does, but not of what its kernels do."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "pallas_call":
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)


def busy(stages: int, layout: StepLayout) -> list[int]:
    """-> how many micro-batches each stage computes of a step that is cut into as many as there may be."""
    count = lambda x, m, is_real, seen: (x, seen + is_real.astype(jnp.int32))
    run = lambda: rotate(count, jnp.zeros((MOST, 1, 1)), jnp.zeros(1, jnp.int32), layout.axes.stage)[1]
    spec = PartitionSpec("stage")
    return jax.shard_map(run, mesh=layout.mesh, in_specs=(), out_specs=spec, check_vma=False)().tolist()


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    mock.patch.dict("engine.layout.HALF_TOKENS", {"cpu": HALF}).start()
    cases = [case.split(",") for case in sys.argv[1:]]
    ways = {"compiled": compiled, "linked": linked}
    found = [ways[way](int(layers), int(tokens), mesh) for way, layers, tokens, mesh in cases]
    json.dump(found, sys.stdout)
