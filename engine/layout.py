"""What of a step lies where on a mesh: parameters and caches in parts over its devices, all else on each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.kv_scales import abstract_scales
from engine.models.config import ModelConfig
from engine.models.narrow import Plan
from engine.models.narrow_placement import abstract_narrow
from engine.models.params import Params
from engine.models.pipeline import micro_batches
from engine.models.placement import on_all, on_mesh, stage_layers
from engine.models.transformer import attention_spec
from engine.slots import empty_tables
from engine.speculation import draft_model
from engine.speculation.checkpoint import abstract_draft
from engine.speculation.drafter import Drafter
from engine.speculation.step import speculating_step
from engine.step import DeviceState, StepOutput, step
from engine.step_input import StepShape, flat_size
from kernels.attention import Backend
from kernels.cuda import all_reduce
from sharding.axes import Axes, axes_of
from sharding.mesh import AXES
from sharding.topology import read_topology

ALL, EACH = PartitionSpec(), PartitionSpec(AXES[1:])  # whole on every device; a part, along the first axis, on each
EMPTY: Plan = {}
MICRO_TOKENS = {"cpu": 8}  # of a pipeline's micro-batch at least: with fewer, a stage's time is that of its weights
OTHER_MICRO_TOKENS = 128
HALF_TOKENS = {"gpu": 2048}  # of a micro-batch at least that is computed while devices of one stage add up another


class StepLayout:
    """A model on a mesh (stage, model). `specs`: what each place of a stage asks of the attention backend."""

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        expert_parallel: bool = False,
        plan: Plan = EMPTY,
        scaled: bool = False,
        drafter: Drafter | None = None,
        custom_all_reduce: bool = False,
    ):
        """`plan`: which parameters are stored in few bits, and `scaled`: whether layers have scales of keys and values.
        `drafter`: who speculates, if any; what it has of its own is whole on every device. `custom_all_reduce`: small
        sums are a kernel of ours, where the devices have a link. Errors: ValueError for a mesh that cannot hold the
        model."""
        draft = drafter and drafter.model
        self.plan, self.scaled, self.drafter = plan, scaled, drafter
        self.draft_specs = [attention_spec(draft, i) for i in range(len(draft.layers))] if draft else []
        self.model, self.mesh, self.axes = model, mesh, axes_of(mesh)
        self.placed = on_mesh(model, mesh, expert_parallel)
        places = stage_layers(model.layers, self.axes.stage.size)
        self.specs = [attention_spec(model, place[0] or 0, self.axes.model.size) for place in places]
        self.of_all = on_all(mesh)
        self.of_each = NamedSharding(mesh, EACH) if mesh.size > 1 else self.of_all
        # In the form that shard_map takes.
        self.param_specs = jax.tree.map(lambda a: a.sharding.spec if mesh.size > 1 else ALL, self.params("float32"))
        self.state_specs: Any = DeviceState(EACH, ALL, ALL, ALL, ALL, ALL, EACH)  # type: ignore[arg-type]
        self._platform = mesh.devices.flat[0].platform
        self.has_link = custom_all_reduce and has_link(mesh)

    def params(self, dtype: str) -> Params:
        """-> shapes, dtypes and shardings of the parameters."""
        params = abstract_narrow(self.placed, dtype, self.plan)
        if self.scaled:
            params = abstract_scales(self.model, params, self.mesh)
        if self.drafter and self.drafter.model is not None:
            params = params | {"draft": _on(self.of_all, abstract_draft(self.drafter, dtype))}
        return params

    def state(
        self, backend: Backend, num_pages: int, page_size: int, dtypes: tuple[str, str], slots: int, max_model_len: int
    ) -> DeviceState:
        """-> shapes, dtypes and shardings of the state; `dtypes`: the model's and the KV cache's.

        Each device has its own heads' pages; of the caches of all together, pages are the first axis again.
        """
        dtype, kv_dtype = dtypes
        caches = [backend.cache_spec(spec, num_pages * self.mesh.size, page_size, kv_dtype) for spec in self.specs]
        page_table = jax.ShapeDtypeStruct((slots, -(-max_model_len // page_size)), jnp.int32)
        tables = jax.eval_shape(partial(empty_tables, slots, max_model_len, self.model.vocab_size))
        lengths = jax.ShapeDtypeStruct((slots,), jnp.int32) if self.drafter else None
        drafts = [backend.cache_spec(spec, num_pages, page_size, kv_dtype) for spec in self.draft_specs]
        outputs = None
        if self.drafter and self.drafter.has_head:
            outputs = jax.ShapeDtypeStruct((slots, self.model.hidden_size), dtype)
        rest = (page_table, tables, lengths, drafts, outputs)
        link = all_reduce.abstract_link(self.mesh, "model") if self.has_link else None
        return DeviceState(_on(self.of_each, caches), *_on(self.of_all, rest), link=_on(self.of_each, link))

    def flat(self, shape: StepShape) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((flat_size(shape),), jnp.int32, sharding=self.of_all)

    def step(
        self, backend: Backend, page_size: int, shape: StepShape, params: Params, state: DeviceState, flat: Array
    ) -> tuple[DeviceState, StepOutput]:
        """As `step.step`, over the whole mesh."""
        axes = self.step_axes(shape)
        each = partial(step, self.model, backend, page_size, shape, drafter=self.drafter)
        if shape.drafts:
            assert self.drafter is not None
            each = partial(speculating_step, self.drafter, self.model, backend, page_size, shape)

        def one(params: Params, state: DeviceState, flat: Array) -> tuple[DeviceState, StepOutput]:
            link = None if axes.is_overlapped else state.link  # which has room for one sum at a time
            return each(params, state, flat, axes=replace(axes, model=replace(axes.model, link=link)))

        own = self.state_specs
        return self.spread(one, (self.param_specs, own, ALL), (own, ALL))(params, state, flat)

    def step_axes(self, shape: StepShape) -> Axes:
        """-> the axes, with the parts that a step is cut into: for the stages of a pipeline; in one stage, for devices
        to compute one while they add up another (vLLM's dual batch overlap)."""
        count = 1
        if self.axes.stage.size > 1:
            count = micro_batches(shape.tokens, MICRO_TOKENS.get(self._platform, OTHER_MICRO_TOKENS))
        elif self.axes.model.size > 1 and self._platform in HALF_TOKENS:
            count = micro_batches(shape.tokens, HALF_TOKENS[self._platform], most=2)
        return replace(self.axes, micro_batches=count)

    def fill(
        self, backend: Backend, page_size: int, shape: StepShape, params: Params, state: DeviceState, flat: Array
    ) -> DeviceState:
        """As `draft_model.fill`, on every device of the mesh."""
        assert self.drafter is not None and self.drafter.model is not None
        one = partial(draft_model.fill, self.drafter.model, backend, page_size, shape)
        own = self.state_specs
        return self.spread(one, (self.param_specs, own, ALL), own)(params, state, flat)

    def spread(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """-> the function as every device of the mesh computes it on its own parts of what `inputs` splits."""
        if self.mesh.size == 1:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def has_link(mesh: Mesh) -> bool:
    """-> whether devices that share layers add up through each other's memory: GPUs of one process with NVLinks."""
    devices = list(mesh.devices.flat)
    here = devices[0].platform == "gpu" and len({device.process_index for device in devices}) == 1
    if not here or mesh.shape["model"] == 1 or mesh.size > all_reduce.MOST_DEVICES:
        return False
    return all(map(all_reduce.runs_on, devices)) and read_topology(devices).link == "NVLink"


def _on(sharding: Any, tree: Any) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)
