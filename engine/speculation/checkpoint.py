"""The checkpoint of what drafts: a model of its own, an EAGLE-3 head, or the MTP layer in the verifying model's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.kv_scales import abstract_scales, wanted, with_scales
from engine.models.config import ModelConfig
from engine.models.fields import Fields
from engine.models.narrow_placement import abstract_narrow, random_narrow
from engine.models.params import Params, ParamSpec
from engine.models.placement import whole
from engine.models.read import from_hugging_face
from engine.speculation.drafter import Drafter
from engine.speculative_config import SpeculativeConfig
from engine.weights.hub import locate
from engine.weights.load import Checkpoint, load_params, open_checkpoint, read_config
from engine.weights.names import HF
from engine.weights.safetensors import open_safetensors
from engine.weights.stored import StoredTensor, read_all

EAGLE3_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
Load = Callable[[str, int], Params]  # dtype and seed -> the parameters that draft


class Draft(NamedTuple):
    """Who drafts, and how its parameters are loaded, if it has some."""

    drafter: Drafter
    load: Load | None = None


def open_draft(spec: SpeculativeConfig, target: ModelConfig, checkpoint: Any, *, dummy: bool, kv_dtype: str) -> Draft:
    """-> what drafts for a model of this config and opened checkpoint. `dummy`: config.json is enough.

    A draft model's scales of keys and values are its checkpoint's or measured, as the verifying model's are. A head
    reads what that model computes, so that tokens alone measure nothing of it: it stores numbers as they are.

    Errors: ValueError that names the setting, or the file at fault.
    """
    if spec.has_head and kv_dtype == "int8":
        raise ValueError(f"kv_cache_dtype: int8 needs scales, which a head for method {spec.method!r} lacks; take fp8")
    if spec.method == "mtp":
        return _open_mtp(spec, target, None if dummy else checkpoint)
    if spec.model is None:
        return Draft(Drafter(spec))
    path = locate(spec.model, weights=not dummy, setting="speculative_config: model")
    if spec.method == "eagle3":
        return _open_eagle3(spec, target, path, dummy)
    return _open_model(spec, target, path, dummy, kv_dtype)


def abstract_draft(drafter: Drafter, dtype: str) -> Params:
    """-> shapes and dtypes of the parameters that draft."""
    assert drafter.model is not None
    own = {name: jax.ShapeDtypeStruct(s.shape, s.dtype or dtype) for name, s in _head_specs(drafter).items()}
    params = abstract_narrow(whole(drafter.model), dtype, {}) | own
    return abstract_scales(drafter.model, params) if drafter.scaled else params


def _head_specs(drafter: Drafter) -> dict[str, ParamSpec]:
    """-> a head's parameters beside those that a model of one layer has; its `embed` is the head's own lm_head."""
    assert drafter.model is not None
    D, V = drafter.model.hidden_size, drafter.model.vocab_size
    norm = ParamSpec((D,), (None,))
    if drafter.config.method == "mtp":
        return {"eh_proj": ParamSpec((2 * D, D), (None, "embed"), 2 * D), "enorm": norm, "hnorm": norm}
    if drafter.config.method == "eagle3":
        fc = ParamSpec((len(drafter.taps) * D, D), (None, "embed"), 3 * D)
        return {"fc": fc, "hidden_norm": norm, "draft_ids": ParamSpec((V,), (None,), dtype="int32")}
    return {}


def _open_model(spec: SpeculativeConfig, target: ModelConfig, path: Path, dummy: bool, kv_dtype: str) -> Draft:
    checkpoint = None if dummy and path.is_dir() else open_checkpoint(path)
    model = checkpoint.config if checkpoint else read_config(path)
    if model.vocab_size != target.vocab_size:
        sizes = f"has a vocabulary of {model.vocab_size} tokens, and the model that verifies {target.vocab_size}"
        raise ValueError(f"speculative_config: model {spec.model} {sizes}; take one with the same tokenizer")
    model = replace(model, max_model_len=target.max_model_len)
    stored = checkpoint.kv_scales if isinstance(checkpoint, Checkpoint) else {}
    drafter = Drafter(spec, model, scaled=wanted(model, kv_dtype, stored))

    def load(dtype: str, seed: int) -> Params:
        params = load_params(checkpoint, dtype) if checkpoint else _random(drafter, dtype, seed)
        return with_scales(model, dtype, params, stored, seed) if drafter.scaled else params

    return Draft(drafter, load)


def _open_eagle3(spec: SpeculativeConfig, target: ModelConfig, path: Path, dummy: bool) -> Draft:
    """A folder as EAGLE-3's authors publish it: config.json, and one layer's tensors with `fc`, `d2t` and `lm_head`."""
    file = path / "config.json"
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"speculative_config: model {spec.model} has no readable config.json: {error}") from None
    if not isinstance(values, dict) or values.get("architectures") not in [[name] for name in EAGLE3_ARCHITECTURES]:
        raise ValueError(f"{file}: architectures must name one of {', '.join(EAGLE3_ARCHITECTURES)}")
    get = Fields(str(file), values)
    vocab = get("draft_vocab_size", int, get("vocab_size", int))
    as_llama = {"architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "tie_word_embeddings": True}
    family, model = from_hugging_face(str(file), values | as_llama)
    sizes = (model.hidden_size, get("target_hidden_size", int, target.hidden_size), len(model.layers))
    if sizes != (target.hidden_size, target.hidden_size, 1):
        raise ValueError(f"{file}: must be one layer of hidden_size {target.hidden_size}, as the model that verifies")
    if vocab > target.vocab_size:
        raise ValueError(f"{file}: draft_vocab_size {vocab} is more than the model's vocabulary, {target.vocab_size}")
    depth, eagle = len(target.layers), get.nested("eagle_config")
    usual = (2, depth // 2, depth - 3)
    taps = usual if "eagle_aux_hidden_state_layer_ids" not in eagle.values else eagle.list_of(
        "eagle_aux_hidden_state_layer_ids", int, 3, low=-1
    )  # fmt: skip
    if not all(0 <= tap <= depth for tap in taps):
        raise ValueError(f"{file}: layers {taps} are not all in a model of {depth} layers")
    model = replace(model, max_model_len=target.max_model_len, attention_input=2 * model.hidden_size)
    drafter = Drafter(spec, model, tuple(taps), get("norm_before_residual", bool, False))
    if dummy:
        return Draft(drafter, lambda dtype, seed: _random(drafter, dtype, seed))
    files = open_safetensors(path)
    found = {name.removeprefix("model."): files.stored(name) for name in files.tensors}
    found = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in found.items()}
    own = {"fc": found.pop("fc.weight", None), "hidden_norm": found.pop("layers.0.hidden_norm.weight", None)}
    offsets = found.pop("d2t", None)
    found = {f"model.{name}": tensor for name, tensor in found.items() if name not in ("t2d", "embed_tokens.weight")}
    if "model.lm_head.weight" in found:
        found["model.embed_tokens.weight"] = found.pop("model.lm_head.weight")
    layer = Checkpoint(str(path), model, family, HF, found)

    def load(dtype: str, seed: int) -> Params:
        ids = np.arange(vocab) + (
            0 if offsets is None else _whole(str(path), "d2t", offsets, (vocab,)).astype(np.int64)
        )
        if not ((ids >= 0) & (ids < target.vocab_size)).all():
            raise ValueError(f"{path}: d2t names tokens outside the vocabulary of {target.vocab_size}")
        head = _own(str(path), drafter, own, dtype)
        return load_params(layer, dtype) | head | {"draft_ids": jnp.asarray(ids, jnp.int32)}

    return Draft(drafter, load)


def _open_mtp(spec: SpeculativeConfig, target: ModelConfig, checkpoint: Any) -> Draft:
    """The layer behind a model's last (DeepSeek-V3's `num_nextn_predict_layers`); of several the first."""
    drafter = Drafter(spec, replace(target, layers=target.layers[-1:], tie_embeddings=True))
    if checkpoint is None:
        return Draft(drafter, lambda dtype, seed: _random(drafter, dtype, seed))
    prefix = f"model.layers.{len(target.layers)}."
    if not isinstance(checkpoint, Checkpoint) or f"{prefix}eh_proj.weight" not in checkpoint.tensors:
        problem = f"{prefix}eh_proj.weight is not in it, which a layer that predicts further tokens has"
        raise ValueError(f"speculative_config: method 'mtp' needs another checkpoint of the model: {problem}")
    tensors, cut = checkpoint.tensors, len(prefix)
    found = {name[cut:]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    own = {name: found.pop(f"{name}.weight", None) for name in ("eh_proj", "enorm", "hnorm")}
    found.pop("embed_tokens.weight", None)  # the model's own
    outside = {
        "model.norm.weight": found.pop("shared_head.norm.weight", None),
        "model.embed_tokens.weight": found.pop("shared_head.head.weight", None) or tensors.get("lm_head.weight"),
    }
    inside = {f"model.layers.0.{name}": tensor for name, tensor in found.items()}
    renamed = inside | {name: tensor for name, tensor in outside.items() if tensor is not None}
    layer = replace(checkpoint, config=drafter.model, tensors=renamed)
    load = lambda dtype, seed: load_params(layer, dtype) | _own(checkpoint.source, drafter, own, dtype)
    return Draft(drafter, load)


def _own(source: str, drafter: Drafter, tensors: Mapping[str, StoredTensor | None], dtype: str) -> Params:
    """-> a head's own parameters; products are stored [out, in]."""
    specs, found = _head_specs(drafter), {}
    for name, tensor in tensors.items():
        if tensor is None:
            raise ValueError(
                f"{source}: {name}.weight is missing, which a head for method {drafter.config.method!r} has"
            )
        array = _whole(source, f"{name}.weight", tensor, specs[name].shape[::-1])
        found[name] = jnp.asarray(array.T, specs[name].dtype or dtype)
    return found


def _whole(source: str, name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape != shape:
        raise ValueError(f"{source}: {name} has shape {tensor.shape}, expected {shape}")
    return read_all(tensor)


def _random(drafter: Drafter, dtype: str, seed: int) -> Params:
    """-> parameters that mean nothing, of the right shapes."""
    assert drafter.model is not None
    params = random_narrow(drafter.model, dtype, seed, whole(drafter.model), {})
    draw = np.random.default_rng(seed)
    for name, spec in _head_specs(drafter).items():
        if spec.dtype == "int32":
            params[name] = jnp.arange(spec.shape[0], dtype=jnp.int32)
        else:
            values = draw.normal(size=spec.shape) / np.sqrt(spec.fan_in) if spec.fan_in else np.ones(spec.shape)
            params[name] = jnp.asarray(values, spec.dtype or dtype)
    return params
