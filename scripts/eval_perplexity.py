"""Perplexity of the default model on 20k tokens of Shakespeare, in float32 and with weights and KV cache in fewer bits.

    python scripts/eval_perplexity.py [--only int8 "KV fp8_e4m3" ...] [--out perplexity.json]

The text (tests/data/shakespeare.txt, public domain) is cut into windows of 1024 tokens; each token but the first of a
window counts, given those before it. What fewer bits cost is told against float32. The model's own forward pass runs
over a paged cache, chunk by chunk, as a prompt does in the engine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.config import NARROW_KV_DTYPES
from engine.kv_scales import wanted, with_scales
from engine.models.config import ModelConfig
from engine.models.params import Params
from engine.models.transformer import attention_spec, forward, logits
from engine.tokenizer_files import load_tokenizer
from engine.weights.default_model import default_model
from engine.weights.load import load_params, open_checkpoint, quantization_of
from kernels.attention import BACKENDS, RaggedBatch

TEXT = Path(__file__).parents[1] / "tests" / "data" / "shakespeare.txt"
TOKENS, WINDOW, CHUNK, PAGE = 20480, 1024, 256, 64
KINDS = {  # setting `quantization`, setting `kv_cache_dtype`
    "float32": ("dequantize", "float32"),
    "gguf": ("gguf", "float32"),
    "int8": ("int8", "float32"),
    "int8_w8a8": ("int8_w8a8", "float32"),
    "fp8": ("fp8", "float32"),
    "fp8_block": ("fp8_block", "float32"),
    "int4": ("int4", "float32"),
    "KV fp8_e4m3": ("dequantize", "fp8_e4m3"),
    "KV fp8_e5m2": ("dequantize", "fp8_e5m2"),
    "KV int8": ("dequantize", "int8"),
}


def batch_at(first: Any) -> RaggedBatch:
    """-> one row's tokens from `first` on, whose pages are all there."""
    at = first + jnp.arange(CHUNK, dtype=jnp.int32)
    return RaggedBatch(
        page_table=jnp.arange(WINDOW // PAGE, dtype=jnp.int32)[None],
        kv_lens=first[None] + CHUNK,
        cu_q_lens=jnp.array([0, CHUNK], jnp.int32),
        num_rows=jnp.int32(1),
        num_decodes=jnp.int32(0),
        write_page=at // PAGE,
        write_offset=at % PAGE,
    )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def chunk_loss(
    model: ModelConfig, params: Params, caches: list[Any], tokens: jax.Array, following: jax.Array, first: jax.Array
) -> tuple[jax.Array, list[Any]]:
    """tokens [CHUNK] from `first` on, following [CHUNK] (-1: none) -> summed negative log-probability, new caches."""
    positions = first + jnp.arange(CHUNK, dtype=jnp.int32)
    hidden, caches = forward(model, BACKENDS["xla"], params, caches, tokens, positions, batch_at(first))
    likely = jax.nn.log_softmax(logits(model, params, hidden), axis=-1)
    own = jnp.take_along_axis(likely, jnp.maximum(following, 0)[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.where(following >= 0, own, 0)), caches


def perplexity(kind: str) -> float:
    """-> e to the mean negative log-probability of a token."""
    quantization, kv = KINDS[kind]
    file = default_model()
    checkpoint, kv_dtype = open_checkpoint(file), NARROW_KV_DTYPES.get(kv, kv)
    model = checkpoint.config
    how = quantization_of(checkpoint, quantization, jax.devices()[0].platform, "float32")
    params = load_params(checkpoint, "float32", quantization=how)
    if wanted(model, kv_dtype, {}):
        params = with_scales(model, "float32", params, {}, seed=0)
    ids = np.asarray(load_tokenizer(file).encode(TEXT.read_text(), add_special_tokens=False)[:TOKENS], np.int32)
    if len(ids) < TOKENS:
        raise SystemExit(f"{TEXT} has {len(ids)} tokens, {TOKENS} are needed")
    specs = [attention_spec(model, i) for i in range(len(model.layers))]
    caches = [BACKENDS["xla"].cache_spec(spec, WINDOW // PAGE, PAGE, kv_dtype) for spec in specs]
    caches = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), caches)
    total = 0.0
    for window in ids.reshape(-1, WINDOW):
        following = np.append(window[1:], np.int32(-1))
        for first in range(0, WINDOW, CHUNK):
            part = slice(first, first + CHUNK)
            loss, caches = chunk_loss(model, params, caches, window[part], following[part], np.int32(first))
            total += float(loss)
    return math.exp(total / (TOKENS - TOKENS // WINDOW))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, float] = {}
    for kind in ["float32", *(kind for kind in args.only if kind != "float32")]:
        started = time.perf_counter()
        found[kind] = perplexity(kind)
        change = found[kind] / found["float32"] - 1
        print(f"{kind:12} {found[kind]:9.4f} {change:+9.4%}  {time.perf_counter() - started:.0f} s", flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
