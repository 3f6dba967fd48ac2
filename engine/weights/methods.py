"""How a folder's config.json says that its weights are quantized, and what its tensors then are: read or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.weights.fp8 import with_scales
from engine.weights.int4_tensors import awq_weight, gptq_weight, packed_weight
from engine.weights.mxfp4 import with_dequantized
from engine.weights.narrow_tensors import scaled_weight
from engine.weights.stored import StoredTensor
from kernels.quantized import Layout

Tensors = dict[str, StoredTensor]


def with_method(
    source: str, config: Any, tensors: Mapping[str, StoredTensor]
) -> tuple[Mapping[str, StoredTensor], str | None]:
    """A folder's tensors as stored -> as the model has them, each quantized weight as one, and the method's name.

    `config` is config.json's quantization_config, or None. Scales of activations that a checkpoint brings are not
    used: activations are scaled token by token, which is never less exact. Errors: ValueError for what is unknown.
    """
    if config is None:  # older files say nothing, but have the tensors
        shown = with_scales(source, with_dequantized(source, tensors))
        changed = next((name for name in shown if shown[name] is not tensors.get(name)), None)
        return shown, None if changed is None else "fp8" if f"{changed}_scale_inv" in tensors else "mxfp4"
    if not isinstance(config, dict) or not isinstance(config.get("quant_method"), str):
        raise ValueError(f"{source}: quantization_config: must be an object with quant_method, got {config!r:.80}")
    method = config["quant_method"]
    if method not in _METHODS:
        raise ValueError(
            f"{source}: quantization_config: quant_method {method!r:.40} is not supported; {', '.join(_METHODS)} are"
        )
    return _METHODS[method](f"{source}: quantization_config", source, config, dict(tensors)), method


def _require(where: str, config: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    """Errors: ValueError for a key whose value is none of those allowed; None stands for an absent key, too."""
    for key, values in allowed.items():
        if config.get(key) not in values:
            raise ValueError(f"{where}: {key} {config.get(key)!r:.60} is not supported; {values} are")


def _group_size(where: str, config: Mapping[str, Any]) -> int | None:
    """-> the inputs that share a scale; None: all. Errors: ValueError."""
    size = config.get("group_size")
    if size is None or size == -1:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 16 or size & (size - 1):
        raise ValueError(f"{where}: group_size {size!r:.40} is not supported; -1 and powers of two from 16 on are")
    return size


def _fp8(where: str, source: str, config: Mapping[str, Any], tensors: Tensors) -> Mapping[str, StoredTensor]:
    _require(where, config, activation_scheme=("dynamic", "static", None), weight_block_size=([128, 128], None))
    _require(where, config, fmt=("e4m3", None))
    shown: Mapping[str, StoredTensor] = with_scales(source, tensors)
    return scaled_weights(source, dict(shown), Layout("fp8", activations="token"))


def scaled_weights(source: str, tensors: Tensors, layout: Layout) -> Tensors:
    """-> the tensors, with each NAME.weight and its NAME.weight_scale as one of `layout`."""
    for scale in [name for name in tensors if name.endswith(".weight_scale")]:
        name = scale.removesuffix("_scale")
        weight = _take(source, tensors, name)
        tensors[name] = scaled_weight(f"{source}: {name}", weight, tensors.pop(scale), layout)
        tensors.pop(name.removesuffix("weight") + "input_scale", None)
    return tensors


def _mxfp4(where: str, source: str, config: Mapping[str, Any], tensors: Tensors) -> Mapping[str, StoredTensor]:
    return with_dequantized(source, tensors)


def _awq(where: str, source: str, config: Mapping[str, Any], tensors: Tensors) -> Mapping[str, StoredTensor]:
    _require(where, config, bits=(4,), version=("gemm", "GEMM", None), zero_point=(True, None))
    group = _group_size(where, config)
    for packed in [name for name in tensors if name.endswith(".qweight")]:
        stem = packed.removesuffix("qweight")
        values, zeros, scales = (_take(source, tensors, stem + part) for part in ("qweight", "qzeros", "scales"))
        tensors[f"{stem}weight"] = awq_weight(f"{source}: {packed}", values, zeros, scales, group=group)
    return tensors


def _gptq(where: str, source: str, config: Mapping[str, Any], tensors: Tensors) -> Mapping[str, StoredTensor]:
    _require(where, config, bits=(4,), checkpoint_format=("gptq", "gptq_v2", None))
    group, symmetric = _group_size(where, config), config.get("sym", True) is True
    for packed in [name for name in tensors if name.endswith(".qweight")]:
        stem = packed.removesuffix("qweight")
        values, zeros, scales = (_take(source, tensors, stem + part) for part in ("qweight", "qzeros", "scales"))
        offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        order = tensors.pop(f"{stem}g_idx", None)
        tensors[f"{stem}weight"] = gptq_weight(
            f"{source}: {packed}", values, zeros, scales, order, group=group, symmetric=symmetric, offset=offset
        )
    return tensors


def _compressed(where: str, source: str, config: Mapping[str, Any], tensors: Tensors) -> Mapping[str, StoredTensor]:
    """The formats of Neural Magic's compressed-tensors that store whole weights in 8 or 4 bits.

    Not those whose activations are rotated between products (transform_config), which the tensors do not show.
    """
    formats = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
    _require(where, config, format=formats, transform_config=({}, None))
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, dict):
        raise ValueError(f"{where}: sparsity_config must be an object, got {sparsity!r:.80}")
    _require(f"{where}: sparsity_config", sparsity, format=("dense", None))
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(group := next(iter(groups.values())), dict):
        raise ValueError(f"{where}: config_groups must hold one group of weights, got {groups!r:.80}")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, (dict, type(None))):
        raise ValueError(f"{where}: config_groups: weights must be an object, got {weights!r:.80}")
    where += ": weights"
    if config["format"] == "pack-quantized":
        _require(where, weights, num_bits=(4,), type=("int", None), strategy=("group", "channel"))
        if inputs is not None:
            raise ValueError(f"{where}: input_activations are not supported for weights of 4 bits")
        return _pack_quantized(where, source, weights, tensors)
    _require(where, weights, num_bits=(8,), type=("int", "float"), symmetric=(True, None))
    _require(where, weights, strategy=("tensor", "channel", "block"), block_structure=([128, 128], None))
    if inputs is not None:
        _require(f"{where}: input_activations", inputs, num_bits=(8,), type=(weights["type"],), symmetric=(True, None))
    kind = "int8" if weights["type"] == "int" else "fp8"
    if weights["strategy"] == "block":
        renamed = {name + "_inv" if name.endswith(".weight_scale") else name: t for name, t in tensors.items()}
        return with_scales(source, renamed)
    return scaled_weights(source, tensors, Layout(kind, activations="none" if inputs is None else "token"))


def _pack_quantized(
    where: str, source: str, weights: Mapping[str, Any], tensors: Tensors
) -> Mapping[str, StoredTensor]:
    group = _group_size(where, weights)
    for packed in [name for name in tensors if name.endswith(".weight_packed")]:
        stem = packed.removesuffix("_packed")
        values, scales = _take(source, tensors, packed), _take(source, tensors, f"{stem}_scale")
        zeros = tensors.pop(f"{stem}_zero_point", None)
        order = tensors.pop(f"{stem}_g_idx", None)
        tensors.pop(f"{stem}_shape", None)
        tensors[stem] = packed_weight(f"{source}: {packed}", values, scales, zeros, order, group=group)
    return tensors


def _take(source: str, tensors: Tensors, name: str) -> StoredTensor:
    if name not in tensors:
        raise ValueError(f"{source}: tensors are missing: {name}")
    return tensors.pop(name)


_METHODS = {"fp8": _fp8, "mxfp4": _mxfp4, "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}
