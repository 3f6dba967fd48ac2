"""What the setting `quantization` makes of a checkpoint: which parameters are kept in few bits, and in which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.models.config import ModelConfig
from engine.models.narrow import INPUTS, ONLINE, Path, Plan, Split, Storage, fit, online_plan
from engine.weights.assemble import Recipe
from engine.weights.packed import is_packed
from engine.weights.part import Part
from engine.weights.stored import StoredTensor

EXPAND = "dequantize"
METHODS = ("gguf", "fp8", "mxfp4", "awq", "gptq", "compressed-tensors")  # that checkpoints may have


@dataclass(frozen=True)
class Quantization:
    """`plan`: how each parameter that is kept in few bits is stored. `online`: loading makes it so, of a wide one."""

    name: str = "none"
    plan: Plan = field(default_factory=dict)
    online: bool = False


def choose_quantization(
    setting: str | None, method: str | None, recipes: Sequence[Recipe], tensors: Mapping[str, StoredTensor],
    config: ModelConfig, platform: str, dtype: str,
) -> Quantization:  # fmt: skip
    """-> what to do with a checkpoint of `method` (None: in 16 or 32 bits) on a platform ("cpu", "gpu", "tpu").

    Without a setting an accelerator keeps weights as they are stored, and a CPU expands them to `dtype`: it multiplies
    float32 fastest unless there is one token at a time. Errors: ValueError for a setting that does not fit.
    """
    if setting is None:
        setting = EXPAND if platform == "cpu" or method is None else method
    if setting == EXPAND:
        return Quantization(EXPAND if method else "none")
    if method and setting == method:
        return Quantization(method, stored_plan(recipes, tensors, platform, dtype))
    if setting in ONLINE:
        return Quantization(setting, online_plan(config, setting, platform, dtype), online=True)
    own = f"is quantized as {method}" if method else "is not quantized"
    raise ValueError(f"quantization: {setting!r} is not possible, the model {own}; name one of {', '.join(ONLINE)}")


def stored_plan(
    recipes: Sequence[Recipe], tensors: Mapping[str, StoredTensor], platform: str, dtype: str
) -> dict[Path, Storage | Split]:
    """-> the plan that keeps what can be kept: products' weights, and all parts of an expert's only if they agree."""
    plan: dict[Path, Storage | Split] = {}
    for recipe in recipes:
        name = recipe.path[-1]
        if name not in INPUTS:
            continue
        shape = recipe.spec.shape
        found = [_storage(tensors[part.tensor], name, shape, platform, dtype) for part in recipe.parts]
        if all(storage == found[0] for storage in found):
            if found[0] is not None:
                plan[recipe.path] = found[0]
        elif (axis := _joint(recipe.parts)) is not None and not name.startswith("experts"):
            bounds = [part.at[axis] for part in recipe.parts]
            pieces = zip(bounds, found, strict=True)
            plan[recipe.path] = Split(axis, tuple((at.start or 0, at.stop, storage) for at, storage in pieces))
    return plan


def _storage(tensor: StoredTensor, name: str, shape: tuple[int, ...], platform: str, dtype: str) -> Storage | None:
    """-> how a parameter of this name and shape is stored that is made of the tensor; None if it is in many bits."""
    if not is_packed(tensor):
        return None
    storage: Storage = tensor.storage  # type: ignore[attr-defined]
    return replace(storage, layout=fit(storage.layout, name, shape, platform, dtype))


def _joint(parts: Sequence[Part]) -> int | None:
    """-> the one axis of the parameter along which its parts lie one after another; None if it is not that simple."""
    axes = {i for part in parts for i, at in enumerate(part.at) if at != slice(None)}
    return axes.pop() if len(axes) == 1 and all(part.at for part in parts) else None
