"""That the GPU kernels become Triton modules for an H200: dtypes and operations that Triton lacks show here."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from kernels.attention import AttentionSpec, HeadInputs, RaggedBatch
from kernels.cuda.attention import attend_product, cache_spec
from kernels.cuda.grouped import grouped_dot

try:
    from jax._src.mesh import AbstractDevice, AbstractMesh

    H200 = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
except (ImportError, TypeError):
    H200 = None


@pytest.mark.skipif(H200 is None, reason="this JAX cannot lower for a GPU that is not there")
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize(("head_dim", "rotated"), [(128, 128), (80, 40)])
@pytest.mark.parametrize(("rows", "tokens"), [(8, 8), (512, 512), (8, 64)], ids=["split", "unsplit", "mixed"])
def test_kernels_lower_for_a_gpu(rows: int, tokens: int, head_dim: int, rotated: int, kv_dtype: str):
    spec = AttentionSpec(8, 3, head_dim, 0.1, window=100, soft_cap=30.0)
    given = jax.ShapeDtypeStruct
    ints = lambda *shape: given(shape, jnp.int32)
    batch = RaggedBatch(ints(rows, 16), ints(rows), ints(rows + 1), ints(), ints(), ints(tokens), ints(tokens))
    norm, table = given((head_dim,), jnp.bfloat16), given((tokens, rotated // 2), jnp.float32)
    inputs = HeadInputs(
        given((tokens, 8, 5, head_dim), jnp.bfloat16),
        bias=given((8, 5, head_dim), jnp.bfloat16), q_norm=norm, k_norm=norm, rope=(table, table),
    )  # fmt: skip
    options = {"sinks": given((8, 3), jnp.float32), "kv_scales": given((2, 8), jnp.float32)}
    step = jax.jit(partial(attend_product, multiprocessors=132), static_argnums=3)
    with jax.sharding.use_abstract_mesh(H200):
        traced = step.trace(inputs, cache_spec(spec, 5, 16, kv_dtype), batch, spec, **options)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(H200 is None, reason="this JAX cannot lower for a GPU that is not there")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 256, 4096])
def test_grouped_products_lower_for_a_gpu(tokens: int, dtype: str):
    given = jax.ShapeDtypeStruct
    with jax.sharding.use_abstract_mesh(H200):
        traced = jax.jit(grouped_dot).trace(
            given((8 * tokens, 96), dtype), given((64, 96, 160), dtype), given((64,), jnp.int32)
        )
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
