"""Formats of few bits: packing, what numbers stand for, and how far quantizing moves them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import cpu
from kernels.product import product, rows_product, take_rows
from kernels.quantized import SUPER, Layout, QuantizedTensor, dequantize, pack, quantize, split_of, unpack

LAYOUTS = {
    "int8": Layout("int8"),
    "int8, groups": Layout("int8", group=32),
    "int8, narrow activations": Layout("int8", activations="token"),
    "int8, narrow groups": Layout("int8", group=128, activations="token_group"),
    "fp8": Layout("fp8"),
    "fp8, narrow activations": Layout("fp8", activations="token"),
    "fp8, blocks": Layout("fp8", group=128, rows=64, activations="token_group"),
    "int4": Layout("int4", group=32, split=128),
    "int4, groups larger than the split": Layout("int4", group=128, split=32),
}
OUTPUTS, INPUTS = (3, 128), 512


def weights(kind: str) -> np.ndarray:
    """-> [*OUTPUTS, INPUTS]; with outliers, one in a hundred is 50 times as large."""
    draw = np.random.default_rng(0)
    w = draw.standard_normal((*OUTPUTS, INPUTS)).astype(np.float32)
    return w * np.where(draw.random(w.shape) < 0.01, 50, 1).astype(np.float32) if kind == "outliers" else w


each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
each_kind = pytest.mark.parametrize("kind", ["normal", "outliers"])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("split", [16, 128])
def test_unpacking_gives_back_what_was_packed(bits, split):
    values = np.random.default_rng(0).integers(0, 1 << bits, (3, 512), np.uint8)
    packed = pack(jnp.asarray(values), split, bits)
    assert packed.shape == (3, 512 * bits // 8)
    np.testing.assert_array_equal(unpack(packed, split, bits), values)


def test_a_byte_has_the_inputs_that_are_a_split_apart():
    packed = pack(jnp.arange(256, dtype=jnp.uint8)[None] % 16, split=8)
    assert int(packed[0, 1]) == 1 | 9 << 4


@pytest.mark.parametrize(("inputs", "split"), [(576, 32), (1536, 128), (4096, 128), (32, 16)])
def test_the_split_is_the_largest_that_fits(inputs, split):
    assert split_of(inputs) == split


@each_layout
@each_kind
def test_quantizing_moves_a_number_no_further_than_the_format_says(layout, kind):
    w = weights(kind)
    quantized = quantize(jnp.asarray(w), layout)
    error = np.abs(np.asarray(dequantize(quantized, "float32")) - w)
    scales = np.repeat(np.asarray(quantized.scales), layout.rows, axis=1)
    scales = np.abs(np.repeat(scales, INPUTS // scales.shape[-1], axis=-1))
    bound = {"int8": scales / 2, "int4": scales, "fp8": np.maximum(np.abs(w) / 16, scales / 1024)}[layout.format]
    assert np.all(error <= bound * 1.0001)


@each_layout
@each_kind
def test_a_product_is_that_of_the_dequantized_weight(layout, kind):
    """Narrow activations add their own rounding: half a step of the token's (or group's) largest value for each."""
    x = np.random.default_rng(1).standard_normal((5, INPUTS)).astype(np.float32)
    quantized = quantize(jnp.asarray(weights(kind)), layout)
    w = np.asarray(dequantize(quantized, "float32")).astype(np.float64).reshape(-1, INPUTS)
    y = np.asarray(product(jnp.asarray(x), quantized))
    assert y.shape == (5, *OUTPUTS)
    moved = np.zeros_like(x)
    if layout.activations != "none":
        groups = INPUTS // layout.group if layout.group else 1
        size = np.abs(x.reshape(5, groups, -1))
        largest = size.max(axis=-1, keepdims=True)
        narrow = np.maximum(size / 16, largest / 448 / 1024)
        step = largest / 127 / 2 if layout.format == "int8" else narrow
        moved = np.broadcast_to(step, (5, groups, INPUTS // groups)).reshape(x.shape)
    bound = (moved + np.abs(x) * 1e-6) @ np.abs(w).T
    assert np.all(np.abs(y.reshape(5, -1) - x @ w.T) <= bound)


def test_rows_are_looked_up_in_the_dtype_of_the_model():
    table = quantize(jnp.asarray(weights("normal")[0]), Layout("int8", dtype="bfloat16"))
    taken = take_rows(table, jnp.asarray([5, 1]))
    assert taken.dtype == jnp.bfloat16
    np.testing.assert_array_equal(taken, dequantize(table, "bfloat16")[jnp.asarray([5, 1])])


def test_logits_of_narrow_weights_are_float32():
    table = quantize(jnp.asarray(weights("normal")[0]), Layout("int8"))
    assert rows_product(jnp.ones((2, INPUTS), jnp.bfloat16), table).dtype == jnp.float32


def random_tensor(layout: Layout, outputs: int = 96, **others: str) -> QuantizedTensor:
    """-> a weight of random bits [outputs, INPUTS], scales of one group in sixteen 50 times as large as the others'.

    `others`: dtypes of further arrays.
    """
    draw = np.random.default_rng(2)
    groups = INPUTS // (layout.group or INPUTS)
    if layout.packing == 2:
        values = draw.integers(0, 256, (outputs, INPUTS // 2), np.uint8)
    else:
        values = draw.integers(-127, 128, (outputs, INPUTS), np.int8)

    def numbers(dtype: str, count: int, limit: int = 16) -> jnp.ndarray:
        if dtype.startswith("float"):
            outliers = np.where(draw.random((outputs, count)) < 1 / 16, 50, 1)
            return jnp.asarray(draw.standard_normal((outputs, count)) * outliers, dtype)
        return jnp.asarray(draw.integers(0, limit, (outputs, count)), dtype)

    scales = numbers({"q4_k": "uint8", "q6_k": "int8", "mxfp4": "uint8"}.get(layout.format, "float16"), groups)
    if layout.format == "mxfp4":
        scales = scales + jnp.uint8(120)  # powers of two from 2 ** -7 to 2 ** 8
    sizes = {"super_scales": (INPUTS // SUPER,), "super_minima": (INPUTS // SUPER,), "high": (INPUTS // 4, 256)}
    more = {name: numbers(dtype, *sizes.get(name, (groups,))) for name, dtype in others.items()}
    return QuantizedTensor(layout, jnp.asarray(values), scales, **more)


FOR_CPUS = {
    "int8": random_tensor(Layout("int8")),
    "Q8_0": random_tensor(Layout("int8", group=32)),
    "Q4_0": random_tensor(Layout("int4", group=32, split=16)),
    "Q4_1": random_tensor(Layout("int4", group=32, split=16), minima="float16"),
    "AWQ": random_tensor(Layout("int4", group=128, split=16), zeros="uint8"),
    "Q4_K": random_tensor(
        Layout("q4_k", group=32, split=16), minima="uint8", super_scales="float16", super_minima="float16"
    ),
}
PACKED = FOR_CPUS | {
    "GPTQ, groups of 16": random_tensor(Layout("int4", group=16, split=128), zeros="uint8"),
    "MXFP4": random_tensor(Layout("mxfp4", group=32, split=128)),
    "Q6_K": random_tensor(Layout("q6_k", group=16, split=128), high="uint8", super_scales="float16"),
}


@pytest.mark.parametrize("weight", PACKED.values(), ids=PACKED.keys())
def test_a_product_with_a_packed_weight_is_that_of_what_it_stands_for(weight):
    x = np.random.default_rng(3).standard_normal((5, INPUTS)).astype(np.float32)
    w = np.asarray(dequantize(weight, "float32")).astype(np.float64)
    y = np.asarray(product(jnp.asarray(x), weight))
    assert np.all(np.abs(y - x @ w.T) <= 1e-6 * np.abs(x) @ np.abs(w).T)


@pytest.mark.parametrize("weight", FOR_CPUS.values(), ids=FOR_CPUS.keys())
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("most_windows", [cpu.MOST_WINDOWS, 8], ids=["written out", "in pieces"])
def test_products_of_few_tokens_on_a_cpu_are_off_by_the_rounding_of_float32(weight, tokens, most_windows, monkeypatch):
    monkeypatch.setattr(cpu, "MOST_WINDOWS", most_windows)
    x = np.random.default_rng(3).standard_normal((tokens, INPUTS)).astype(np.float32)
    assert cpu.supports(tokens, weight)
    y = np.asarray(cpu.few_tokens(jnp.asarray(x), weight, jnp.dtype("float32")))
    w = np.asarray(dequantize(weight, "float32")).astype(np.float64)
    error = np.abs(y - x.astype(np.float64) @ w.T)
    assert np.all(error <= 1e-6 * np.abs(x).sum(axis=-1, keepdims=True) * np.abs(w).max())


def test_groups_must_fit_what_is_written_out():
    whole = lambda group: random_tensor(Layout("int4", group=group, split=cpu.SPLIT))
    assert cpu.supports(1, whole(64))
    assert not cpu.supports(1, whole(16))
    large = jnp.zeros((1, cpu.MOST_WINDOWS * cpu.WINDOW), jnp.uint8)
    scales = jnp.zeros((1, 1))
    layout = Layout("int4", group=2 * large.shape[1], split=cpu.SPLIT)
    assert not cpu.supports(1, QuantizedTensor(layout, large, scales))
    assert cpu.supports(1, QuantizedTensor(Layout("int4", split=cpu.SPLIT), large, scales))


@pytest.mark.parametrize("windows", [1, 18, 48, 97, 448])
def test_a_weight_is_cut_into_as_few_pieces_as_divide_its_groups_and_superblocks(windows):
    inputs = windows * cpu.WINDOW
    shape = lambda width: jnp.zeros((1, width), jnp.uint8)
    plain = QuantizedTensor(Layout("int4", group=32, split=cpu.SPLIT), shape(inputs // 2), shape(inputs // 32))
    assert cpu.pieces(plain) == {1: 1, 18: 1, 48: 1, 97: 97, 448: 14}[windows]
    if inputs % SUPER == 0:
        assert (inputs // SUPER) % cpu.pieces(plain.replace(super_scales=shape(inputs // SUPER))) == 0
