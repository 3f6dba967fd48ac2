"""Random weights of every format, for the tests of products."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kernels.quantized import SUPER, Layout, QuantizedTensor, quantize

QUANTIZED = {
    "int8": Layout("int8"),
    "int8, groups": Layout("int8", group=32),
    "int8, narrow activations": Layout("int8", activations="token"),
    "fp8": Layout("fp8"),
    "fp8, narrow activations": Layout("fp8", activations="token"),
    "fp8, blocks": Layout("fp8", group=128, rows=128, activations="token_group"),
    "int4": Layout("int4", group=128, split=128),
    "int4, groups": Layout("int4", group=32, split=128),
    "int4, short runs": Layout("int4", group=64, split=32),
}
WITH_MORE = ("int4, zeros", "int4, groups with zeros", "int4, minima")
STORED = ("mxfp4", "q4_k", "q6_k")
FORMATS = (*QUANTIZED, *WITH_MORE, *STORED)


def random_weight(name: str, outputs: int, inputs: int) -> QuantizedTensor:
    """-> a weight [outputs, inputs]."""
    draw = np.random.default_rng(0)
    below = lambda end, *shape: jnp.asarray(draw.integers(0, end, shape, np.uint8))
    factors = lambda *shape: jnp.asarray(draw.uniform(0.01, 0.02, shape), jnp.float16)
    w = jnp.asarray(draw.standard_normal((outputs, inputs)), jnp.float32)
    per = lambda group: (outputs, inputs // group)
    if name in QUANTIZED:
        return quantize(w, QUANTIZED[name])
    if name in WITH_MORE:
        group = 128 if name == "int4, zeros" else 32
        weight = quantize(w, Layout("int4", group=group, split=128))
        if name == "int4, minima":
            return weight.replace(minima=factors(*per(group)))
        return weight.replace(zeros=below(17, *per(group)))
    values = below(256, *per(2))
    if name == "mxfp4":
        return QuantizedTensor(Layout("mxfp4", group=32, split=128), values, below(12, *per(32)) + jnp.uint8(118))
    supers = factors(*per(SUPER))
    if name == "q4_k":
        minima = {"minima": below(64, *per(32)), "super_minima": factors(*per(SUPER))}
        layout = Layout("q4_k", group=32, split=128)
        return QuantizedTensor(layout, values, below(64, *per(32)), super_scales=supers, **minima)
    scales = below(256, *per(16)).astype(jnp.int8)
    return QuantizedTensor(
        Layout("q6_k", group=16, split=128), values, scales, high=below(256, *per(4)), super_scales=supers
    )
