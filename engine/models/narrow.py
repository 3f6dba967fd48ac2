"""Which parameters may be stored in few bits, and what arrays each then is: a plan that loading and compiling share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from engine.models.config import LayerSpec, ModelConfig
from engine.models.params import Params, ParamSpec, map_specs, param_specs
from engine.models.placement import Path
from kernels import cpu
from kernels.product import how_multiplied
from kernels.quantized import SPLIT, SUPER, Layout, QuantizedTensor

# The parameters that are weights of products, and which of their axes those sum over. The router is not among them: its
# choice must not hang on rounding; nor are the two halves of latent attention's kv_b, which meet queries and values.
INPUTS: dict[str, tuple[int, ...]] = {
    "embed": (1,), "lm_head": (1,), "qkv": (0,), "out": (0, 1, 2), "gate_up": (0,), "down": (0,), "q": (0,),
    "q_a": (0,), "q_b": (0,), "kv_a": (0,), "experts_gate_up": (1,), "experts_down": (1,), "shared_gate_up": (0,),
    "shared_down": (0,),
}  # fmt: skip
VOCABULARY = ("embed", "lm_head")

# What a setting makes of a checkpoint in 16 or 32 bits. The vocabulary stays as it is.
ONLINE = {
    "int8": Layout("int8"),
    "int8_w8a8": Layout("int8", activations="token"),
    "int8_block": Layout("int8", group=128, activations="token_group"),
    "fp8": Layout("fp8", activations="token"),
    "fp8_block": Layout("fp8", group=128, rows=128, activations="token_group"),
    "int4": Layout("int4", group=128, split=SPLIT),
}


@dataclass(frozen=True)
class Storage:
    """How a parameter is stored: its layout, and the names and dtypes of a QuantizedTensor's arrays."""

    layout: Layout
    arrays: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Split:
    """A parameter in pieces along an axis of its outputs, some of which may be plain (None): (first, end, storage)."""

    axis: int  # of the parameter
    pieces: tuple[tuple[int, int, Storage | None], ...]


Plan = Mapping[Path, Storage | Split]


def outputs_of(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """A parameter's name and shape -> the axes of its storage that come first, experts and outputs, and its inputs."""
    inputs = INPUTS[name]
    return tuple(size for i, size in enumerate(shape) if i not in inputs), math.prod(shape[i] for i in inputs)


def fit(layout: Layout, name: str, shape: tuple[int, ...], platform: str, dtype: str) -> Layout:
    """-> the layout with groups, rows and split that divide a parameter of this shape.

    Packed weights are split as a CPU's products want it, or elsewhere by as much as fits.
    """
    outputs, inputs = outputs_of(name, shape)
    split = math.gcd(cpu.SPLIT if platform == "cpu" else SPLIT, inputs // 2) if layout.packing == 2 else 0
    group = None if layout.group is None else math.gcd(layout.group, inputs)
    return replace(layout, group=group, rows=math.gcd(layout.rows, outputs[-1]), split=split, dtype=dtype)


def online_plan(config: ModelConfig, method: str, platform: str, dtype: str) -> dict[Path, Storage]:
    """-> how a model is stored that is quantized by `method`, one of ONLINE, while it is loaded."""
    plan: dict[Path, Storage] = {}
    narrow = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "uint8"}

    def one(path: Path, spec: ParamSpec) -> None:
        if path[-1] in INPUTS and path[-1] not in VOCABULARY:
            layout = fit(ONLINE[method], path[-1], spec.shape, platform, dtype)
            plan[path] = Storage(layout, (("values", narrow[layout.format]), ("scales", "float32")))

    map_specs(one, param_specs(config))
    return plan


def plan_of_few(plan: Plan, layers: Sequence[LayerSpec], few: Sequence[LayerSpec]) -> Plan:
    """-> the plan of a model whose layers are `few`, each of them stored as the first of `layers` that is alike."""
    found = {path: how for path, how in plan.items() if path[0] != "layers"}
    for path, how in plan.items():
        if path[0] == "layers" and layers.index(layers[path[1]]) == path[1]:
            alike = (i for i, layer in enumerate(few) if layer == layers[path[1]])
            found |= {("layers", i, *path[2:]): how for i in alike}
    return found


def width(name: str, inputs: int, layout: Layout) -> int:
    """-> how many entries an array of a QuantizedTensor has for K inputs."""
    per_entry = {"values": layout.packing, "high": 4, "super_scales": SUPER, "super_minima": SUPER}
    return inputs // per_entry.get(name, layout.group or inputs)


def array_shape(name: str, outputs: tuple[int, ...], inputs: int, layout: Layout) -> tuple[int, ...]:
    """-> the shape of one of a QuantizedTensor's arrays."""
    last = outputs[-1] // layout.rows if name == "scales" else outputs[-1]
    return (*outputs[:-1], last, width(name, inputs, layout))


def describe(params: Params) -> str:
    """-> what the weights of a tree of parameters are stored as, how they are multiplied here, and their sizes."""
    kinds: dict[str, int] = {}
    platform = jax.default_backend()
    for leaf in jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, QuantizedTensor)):
        if isinstance(leaf, QuantizedTensor):
            kind = f"{layout_name(leaf.layout)}, {how_multiplied(jax.tree.map(_own, leaf), platform)}:"
        else:
            kind = str(jnp.dtype(leaf.dtype))
        kinds[kind] = kinds.get(kind, 0) + sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(leaf))
    largest = sorted(kinds.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {count / 2**20:.0f} MiB" for kind, count in largest)


def _own(array: jax.Array) -> jax.ShapeDtypeStruct:
    """-> the shape of what one device has of it."""
    return jax.ShapeDtypeStruct(array.sharding.shard_shape(array.shape), array.dtype)


def layout_name(layout: Layout) -> str:
    """-> a layout in words."""
    scales = "a scale per output" if layout.group is None else f"groups of {layout.group}"
    if layout.rows > 1 and layout.group:
        scales = f"blocks of {layout.rows} x {layout.group}"
    narrow = {"none": "", "token": ", activations too", "token_group": ", activations too"}[layout.activations]
    return f"{layout.format} ({scales}{narrow})"
