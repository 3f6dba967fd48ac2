"""Scales of keys and values that a checkpoint brings for a KV cache in 8 bits."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from engine.weights.stored import StoredTensor, read_all

NAME = re.compile(r"model\.layers\.(\d{1,6})\.self_attn\.(?:attn\.|[kv]_proj\.)?([kv])_scale")
MAX_SCALES = 1 << 12  # in one tensor: one, or one for each head

KVScales = Mapping[int, np.ndarray]  # by layer: [2, n] float32, of keys and of values; n is 1 or the KV heads


def split_scales(source: str, tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], KVScales]:
    """A folder's tensors -> those that are no scales of keys or values, and the scales.

    Errors: ValueError for scales that are no positive numbers, or of which a layer has only one kind.
    """
    others, found = dict(tensors), dict[int, dict[str, np.ndarray]]()
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            continue
        del others[name]
        if int(np.prod(tensor.shape)) not in range(1, MAX_SCALES + 1) or tensor.dtype.kind not in "fV":
            raise ValueError(f"{source}: {name} must hold a scale, or one for each KV head; is {list(tensor.shape)}")
        values = read_all(tensor).astype(np.float32).reshape(-1)
        if not np.all(np.isfinite(values) & (values > 0)):
            raise ValueError(f"{source}: {name} must be positive, is {values[:4]}")
        found.setdefault(int(match[1]), {})[match[2]] = values
    for layer, pair in found.items():
        if len(pair) != 2 or pair["k"].shape != pair["v"].shape:
            raise ValueError(f"{source}: layer {layer} needs a k_scale and a v_scale of one shape, has {sorted(pair)}")
    return others, {layer: np.stack([pair["k"], pair["v"]]) for layer, pair in found.items()}
