"""The TPU's products with quantized weights: the reference's, in interpret mode; and the real compiler takes them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.pallas.blocks import Chip
from kernels.pallas.product import Blocks, choose_blocks, matrix_product, supports, vmem_bytes
from kernels.product import reference
from kernels.quantized import dequantize
from tests.kernels.weights import FORMATS, random_weight

ROOT = Path(__file__).parents[3]
CHIPS = {"v5e": Chip("v5e", 128 << 20, 1 << 20, 128), "v7x": Chip("v7x", 64 << 20, 1 << 20, 256)}
NAMES = ("int8", "int8, narrow activations", "fp8", "fp8, narrow activations", "fp8, blocks", "int4")
NARROW = {("v5e", "int8, narrow activations"), ("v7x", "fp8, narrow activations"), ("v7x", "fp8, blocks")}
float32 = jnp.dtype(jnp.float32)


@pytest.mark.parametrize("generation", CHIPS)
@pytest.mark.parametrize("name", NAMES)
def test_a_product_is_the_references(name, generation):
    weight = random_weight(name, 384, 512)  # of which the second block of outputs has a part
    x = jnp.asarray(np.random.default_rng(1).standard_normal((40, 512)), jnp.bfloat16)
    got = matrix_product(x, weight, float32, blocks=Blocks(32, 256, 256), chip=CHIPS[generation], interpret=True)
    if (generation, name) in NARROW:
        wanted, limit = reference(x, weight, float32), 2e-6
    else:  # activations stay wide, and whole numbers are scaled after their product
        wide = dequantize(weight, "float32")
        wanted, limit = jnp.matmul(x.astype(float32), wide.T, precision="highest"), 2e-6
    assert float(jnp.max(jnp.abs(got - wanted)) / jnp.max(jnp.abs(wanted))) < limit


def test_what_is_not_supported_is_named():
    refused = {name: supports(random_weight(name, 128, 512)) for name in FORMATS if name not in NAMES}
    assert all(refused.values()), refused
    assert "q4_k" in str(refused["q4_k"])
    assert "zeros" in str(refused["int4, zeros"])
    assert [supports(random_weight(name, 128, 512)) for name in NAMES] == [None] * len(NAMES)


@pytest.mark.parametrize("rows", [1, 32, 100, 8192])
@pytest.mark.parametrize(("columns", "inputs"), [(6144, 4096), (4096, 14336), (128256, 4096), (576, 1536), (100, 256)])
@pytest.mark.parametrize("packing", [1, 2])
def test_blocks_fit_and_divide_the_inputs(rows, columns, inputs, packing):
    chip = Chip("v5e", 16 << 20, 1 << 20, 128)
    blocks = choose_blocks(rows, columns, inputs, packing, chip)
    assert inputs % blocks.depth == 0
    assert blocks.depth % (128 * packing) == 0
    assert vmem_bytes(blocks, packing, inputs) < 0.75 * chip.vmem


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which pip install '.[tpu]' brings"
)
def test_the_compiler_takes_them_without_a_copy_of_the_weight(tmp_path):
    out = tmp_path / "products.json"
    command = [sys.executable, "scripts/tpu_products.py", "--few", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, timeout=300, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()[-2000:]
    rows = json.loads(out.read_text())
    assert {row["generation"] for row in rows} == {"v5e", "v6e", "v7x"}
    assert all(row["temporaries"] < row["weight"] / 4 for row in rows)
