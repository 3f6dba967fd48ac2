"""Perplexity of the default model on 20k tokens of Shakespeare, in float32 and with weights and KV cache in fewer bits.

    python scripts/eval_perplexity.py [--only int8 "KV int8" ...] [--tokens 20480] [--chunk 256] [--out perplexity.json]

The text (tests/data/shakespeare.txt, public domain) is cut into windows of 1024 tokens; each token but the first of a
window counts, given those before it. What fewer bits cost is told against float32. The model's own forward pass runs
over a paged cache, chunk by chunk, as a prompt does in the engine.

Rounding moves each token's log-probability up or down, and much of that cancels in the mean: so the perplexity of one
rounding is partly luck. `moved`, the root mean square of a token's change, is not. Some kinds take a format apart:
weights alone, keys alone, values alone. "e4m3 weights #n" owes nothing to the engine's formats: weights in float32 are
rounded to four digits of mantissa, in units that n draws between a power of two and the next, one for a parameter.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.config import NARROW_KV_DTYPES
from engine.kv_scales import wanted, with_scales
from engine.models.config import ModelConfig
from engine.models.narrow import INPUTS
from engine.models.params import Params
from engine.models.transformer import attention_spec, forward, logits
from engine.tokenizer_files import load_tokenizer
from engine.weights.default_model import default_model
from engine.weights.load import load_params, open_checkpoint, quantization_of
from kernels.attention import BACKENDS, RaggedBatch
from kernels.xla import Cache, cache_spec

TEXT = Path(__file__).parents[1] / "tests" / "data" / "shakespeare.txt"
TOKENS, WINDOW, CHUNK, PAGE = 20480, 1024, 256, 64


class Kind(NamedTuple):
    """The setting `quantization`, and the dtypes of cached keys and values."""

    quantization: str = "dequantize"
    keys: str = "float32"
    values: str = "float32"
    wide_activations: bool = False  # whatever the setting says
    rounding: int | None = None  # seed of the units that weights are rounded in


KINDS = {
    "float32": Kind(),
    **{name: Kind(name) for name in ("gguf", "int8", "int8_w8a8", "int8_block", "fp8", "fp8_block", "int4")},
    **{f"KV {name}": Kind(keys=name, values=name) for name in ("fp8_e4m3", "fp8_e5m2", "int8")},
    "fp8_block weights": Kind("fp8_block", wide_activations=True),
    "fp8_e4m3 keys": Kind(keys="fp8_e4m3"),
    "fp8_e4m3 values": Kind(values="fp8_e4m3"),
    **{f"e4m3 weights #{seed}": Kind(rounding=seed) for seed in range(4)},
}


def batch_of(at: jax.Array) -> RaggedBatch:
    """at [T], positions one after another -> one row's tokens there, whose pages are all there."""
    count = len(at)
    return RaggedBatch(
        page_table=jnp.arange(WINDOW // PAGE, dtype=jnp.int32)[None],
        kv_lens=at[-1:] + 1,
        cu_q_lens=jnp.array([0, count], jnp.int32),
        num_rows=jnp.int32(1),
        num_decodes=jnp.int32(count == 1),
        write_page=at // PAGE,
        write_offset=at % PAGE,
    )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def chunk_losses(
    model: ModelConfig, params: Params, caches: list[Any], tokens: jax.Array, following: jax.Array, first: jax.Array
) -> tuple[jax.Array, list[Any]]:
    """tokens [T] from `first` on, those that follow [T] -> their negative log-probabilities, new caches."""
    positions = first + jnp.arange(len(tokens), dtype=jnp.int32)
    hidden, caches = forward(model, BACKENDS["xla"], params, caches, tokens, positions, batch_of(positions))
    likely = jax.nn.log_softmax(logits(model, params, hidden), axis=-1)
    return -jnp.take_along_axis(likely, following[:, None], axis=1)[:, 0], caches


def rounded_weights(params: Params, seed: int) -> Params:
    """-> the parameters, with those of products rounded to float8_e4m3fn's mantissa, none of them to subnormals."""
    draw = np.random.default_rng(seed)

    def one(name: str, w: jax.Array) -> jax.Array:
        if name not in INPUTS:
            return w
        unit = jnp.float32(2 ** draw.uniform())
        mantissa, exponent = jnp.frexp(w / unit)
        return jnp.ldexp(jnp.round(mantissa * 16) / 16, exponent) * unit

    return params | {"layers": [{name: one(name, w) for name, w in layer.items()} for layer in params["layers"]]}


def losses(kind: Kind, count: int, chunk: int) -> np.ndarray:
    """-> the negative log-probability of each token but the first of a window, [windows, WINDOW - 1]."""
    file = default_model()
    checkpoint = open_checkpoint(file)
    model = checkpoint.config
    how = quantization_of(checkpoint, kind.quantization, jax.devices()[0].platform, "float32")
    if kind.wide_activations:
        wide = lambda storage: replace(storage, layout=replace(storage.layout, activations="none"))
        how = replace(how, plan={path: wide(storage) for path, storage in how.plan.items()})
    params = load_params(checkpoint, "float32", quantization=how)
    if kind.rounding is not None:
        params = rounded_weights(params, kind.rounding)
    keys, values = (NARROW_KV_DTYPES.get(name, name) for name in (kind.keys, kind.values))
    if wanted(model, keys, {}):
        params = with_scales(model, "float32", params, {}, seed=0)
    ids = np.asarray(load_tokenizer(file).encode(TEXT.read_text(), add_special_tokens=False)[:count], np.int32)
    if len(ids) < count:
        raise SystemExit(f"{TEXT} has {len(ids)} tokens, {count} are needed")
    specs = [cache_spec(attention_spec(model, i), WINDOW // PAGE, PAGE, keys) for i in range(len(model.layers))]
    caches = [Cache(jnp.zeros(s.k.shape, keys), jnp.zeros(s.k.shape, values)) for s in specs]
    found = []
    for window in ids.reshape(-1, WINDOW):
        following = np.append(window[1:], np.int32(0))
        for first in range(0, WINDOW, chunk):
            part = slice(first, first + chunk)
            loss, caches = chunk_losses(model, params, caches, window[part], following[part], np.int32(first))
            found.append(np.asarray(loss, np.float64))
    return np.concatenate(found).reshape(-1, WINDOW)[:, :-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"a multiple of {WINDOW}")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens of a step; 1: as in a decode")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    wide = losses(KINDS["float32"], args.tokens, args.chunk)
    found: dict[str, dict[str, float]] = {}
    for kind in ["float32", *(kind for kind in args.only if kind != "float32")]:
        started = time.perf_counter()
        own = wide if kind == "float32" else losses(KINDS[kind], args.tokens, args.chunk)
        change, moved = math.expm1(np.mean(own - wide)), math.sqrt(np.mean((own - wide) ** 2))
        found[kind] = {"perplexity": math.exp(np.mean(own)), "change": change, "moved": moved}
        took = time.perf_counter() - started
        print(f"{kind:18} {found[kind]['perplexity']:9.4f} {change:+9.4%}  moved {moved:.4f}  {took:.0f} s", flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
