"""Blocks are computed to fit each generation's memories, and what cannot fit is an error before it is compiled."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from kernels.attention import AttentionSpec
from kernels.pallas import tuned
from kernels.pallas.attention import supports, with_fitting_blocks
from kernels.pallas.blocks import VMEM_SHARE, Blocks, Chip, preferred
from kernels.pallas.call import Call
from kernels.pallas.layout import layout_of

MIB = 1 << 20
CHIPS = (Chip("v4", 16 * MIB, MIB, 128), Chip("v6e", 128 * MIB, MIB, 256), Chip("7x", 64 * MIB, MIB, 256))
SPECS = (
    AttentionSpec(8, 4, 128, 1.0),
    AttentionSpec(1, 64, 128, 1.0),
    AttentionSpec(16, 1, 128, 1.0),
    AttentionSpec(1, 4, 256, 1.0, window=512),
    AttentionSpec(3, 3, 64, 1.0),
)


def call_of(spec: AttentionSpec, chip: Chip, page: int, kv_dtype: str = "bfloat16", tokens: int = 2048) -> Call:
    layout = layout_of(spec)
    blocks = preferred(spec, layout, chip, page)
    return Call(spec, layout, blocks, page, tokens, jnp.dtype(jnp.bfloat16), jnp.dtype(kv_dtype), False, False)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.generation)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("page", [8, 16, 256])
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_blocks_fit_every_generation(chip: Chip, spec: AttentionSpec, page: int, kv_dtype: str):
    call, vmem = with_fitting_blocks(call_of(spec, chip, page, kv_dtype), False, 64, 2048 // page, chip)
    assert vmem <= VMEM_SHARE * chip.vmem
    assert call.blocks.decode_kv % page == call.blocks.prefill_kv % page == 0
    assert call.blocks.decode_kv % call.blocks.decode_step == 0


def test_4096_sequences_and_a_million_tokens_of_context_fit():
    call = call_of(SPECS[0], CHIPS[0], 16, tokens=4096)
    with_fitting_blocks(call, True, 4096, 256, CHIPS[0])
    call, _ = with_fitting_blocks(call, False, 8, (1 << 20) // 16, CHIPS[0])
    assert call.blocks.tables >= 2


def test_what_does_not_fit_vmem_is_an_error_with_the_figures():
    call = call_of(AttentionSpec(64, 2, 256, 1.0), CHIPS[0], 256, "float32")
    with pytest.raises(ValueError, match="needs .* KiB of VMEM .* use smaller pages"):
        with_fitting_blocks(call, False, 8, 8, CHIPS[0])


def test_a_table_that_does_not_fit_smem_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match="two rows of the page table .* use larger pages"):
        with_fitting_blocks(call_of(SPECS[0], CHIPS[1], 8), False, 8, 1 << 17, CHIPS[1])


@pytest.mark.parametrize("page", [4, 12, 24])
def test_other_page_sizes_are_refused_by_name(page: int):
    assert supports(SPECS[0], page, "bfloat16") == f"no pages of {page} tokens: powers of two from 8 only"


def test_other_dtypes_are_refused_by_name():
    assert supports(SPECS[0], 16, "float16") == "no KV cache of dtype float16"


def test_tuned_sizes_replace_the_computed_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    call = call_of(SPECS[0], CHIPS[1], 128)
    (tmp_path / "tpu_a.json").write_text(f'{{"{tuned.shape_key(call)}": {{"decode_kv": 512}}}}')
    (tmp_path / "tpu_b.json").write_text(f'{{"{tuned.shape_key(call)}": {{"decode": 512}}}}')
    assert tuned.tuned(Blocks(1, 1024), call, "a") == Blocks(1, 512)
    assert tuned.tuned(Blocks(1, 1024), call, "c") == Blocks(1, 1024)
    with pytest.raises(ValueError, match=r"\['decode'\] are no sizes of blocks"):
        tuned.tuned(Blocks(1, 1024), call, "b")
