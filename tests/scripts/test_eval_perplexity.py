"""What eval_perplexity.py takes formats apart with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from eval_perplexity import rounded_weights


def test_weights_are_rounded_as_float8_e4m3fn_is_and_norms_are_not():
    """Of numbers that a power of two brings into its range; each seed has its own units."""
    w, norm = jax.random.normal(jax.random.key(0), (64, 96)), jnp.linspace(0.1, 1, 96)
    rounded = [rounded_weights({"layers": [{"qkv": w, "attn_norm": norm}]}, seed)["layers"][0] for seed in (0, 1)]
    for seed, layer in enumerate(rounded):
        np.testing.assert_array_equal(layer["attn_norm"], norm)
        unit = np.float32(2 ** np.random.default_rng(seed).uniform())
        scaled = np.asarray(w / unit) * 64
        is_normal = np.abs(scaled) >= 2**-6
        expected = scaled.astype(jnp.float8_e4m3fn).astype(np.float32) / 64 * unit
        np.testing.assert_array_equal(np.asarray(layer["qkv"])[is_normal], expected[is_normal])
        assert is_normal.mean() > 0.99
    assert not np.array_equal(rounded[0]["qkv"], rounded[1]["qkv"])
