"""Weights in few bits on meshes: each device's part stands for its part of the wide one, tokens stay the same."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy

from engine.weights.gguf_packed import TYPES
from tests.engine.weights import test_methods, test_packed

ROOT = pathlib.Path(__file__).parents[3]
D, F, V, HEADS, KV_HEADS, H, LAYERS = 512, 1024, 64, 4, 2, 128, 2
MODULES = {
    "self_attn.q_proj": ("attn_q", HEADS * H, D), "self_attn.k_proj": ("attn_k", KV_HEADS * H, D),
    "self_attn.v_proj": ("attn_v", KV_HEADS * H, D), "self_attn.o_proj": ("attn_output", D, HEADS * H),
    "mlp.gate_proj": ("ffn_gate", F, D), "mlp.up_proj": ("ffn_up", F, D), "mlp.down_proj": ("ffn_down", D, F),
}  # fmt: skip
CONFIG = test_methods.CONFIG | dict(
    hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS, head_dim=H, vocab_size=V,
)  # fmt: skip
# Beside Q4_K: parts of fused weights, and what the first stage has in another format than the second.
MIXED = {"attn_v": "Q6_K", "ffn_up": "F32", "blk.1.ffn_down": "Q6_K"}


def run(cases: list[dict[str, Any]]) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.weights.mesh_program"], cwd=ROOT, env=os.environ, input=json.dumps(cases),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def write_gguf(path: pathlib.Path, default: str, kinds: dict[str, str] | None = None) -> str:
    """Write a Llama of blocks of a type; `kinds`: the types of some tensors, of each layer or of one."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (V, D), "output": (V, D)}
    shapes |= {f"blk.{i}.{name}": (out, size) for i in range(LAYERS) for name, out, size in MODULES.values()}
    norms = ["output_norm", *(f"blk.{i}.{name}_norm" for i in range(LAYERS) for name in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    for seed, (name, shape) in enumerate(shapes.items()):
        kinds = kinds or {}
        kind = kinds.get(name, kinds.get(name.rpartition(".")[2], default))
        if kind == "F32":
            values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1])
            writer.add_tensor(f"{name}.weight", values.astype(np.float32))
        else:
            raw = test_packed.random_blocks(kind, shape, seed)
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def write_folder(folder: pathlib.Path, name: str | None) -> str:
    """Write a folder of one of test_methods.METHODS, or (None) in float32."""
    make, config = test_methods.METHODS[name] if name else (None, None)
    draw = np.random.default_rng(9)
    wide = lambda *shape: (draw.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
    tensors = {"model.embed_tokens.weight": wide(V, D), "lm_head.weight": wide(V, D)}
    tensors["model.norm.weight"] = np.ones(D, np.float32)
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = np.ones(D, np.float32)
        for seed, (module, (_, out, size)) in enumerate(MODULES.items()):
            parts = make(10 * i + seed, out, size)[0] if make else {"weight": wide(out, size)}
            tensors |= {f"model.layers.{i}.{module}.{key}": np.ascontiguousarray(a) for key, a in parts.items()}
    folder.mkdir()
    quantized = {"quantization_config": config} if config else {}
    (folder / "config.json").write_text(json.dumps(CONFIG | quantized))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return str(folder)


def write(folder: pathlib.Path, name: str) -> str:
    if name == "mixed":
        return write_gguf(folder / "mixed.gguf", "Q4_K", MIXED)
    return write_gguf(folder / f"{name}.gguf", name) if name in TYPES else write_folder(folder / name, name)


def test_each_device_has_its_part_of_every_format(tmp_path: pathlib.Path):
    cases = []
    for name in (*TYPES, "mixed", *test_methods.METHODS):
        model = write(tmp_path, name)
        large = name in ("Q4_K", "Q6_K", "mixed")  # superblocks of 256, which a head of 128 on each of four would cut
        cases.append(dict(model=model, stages=2, devices=2 if large else 4, method=None))
    for case, wrong in zip(cases, run(cases), strict=True):
        assert wrong is None, (case, wrong)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("wide") / "model", None)


def test_tokens_on_a_mesh_are_those_of_one_device(tmp_path: pathlib.Path, wide_folder: str):
    settings = [
        dict(model=write(tmp_path, "mixed"), quantization="gguf"),
        dict(model=write(tmp_path, "fp8, blocks"), quantization="fp8"),
        dict(model=wide_folder, quantization="int4", kv_cache_dtype="int8"),
    ]
    mesh = dict(tensor_parallel_size=2, pipeline_parallel_size=2)
    found = run([{"settings": own | more} for own in settings for more in ({}, mesh)])
    for own, one, other in zip(settings, found[::2], found[1::2], strict=True):
        assert isinstance(one, list), one
        assert other == one, own


def test_what_a_mesh_would_cut_is_refused_with_the_numbers(tmp_path: pathlib.Path, wide_folder: str):
    kept = dict(model=write(tmp_path, "Q4_K"), quantization="gguf", tensor_parallel_size=4)
    online = dict(model=wide_folder, quantization="fp8_block", tensor_parallel_size=3)
    first, second = run([{"settings": kept}, {"settings": online}])
    assert first.startswith("ValueError: quantization: layers.0.out is stored with scales for 256 inputs"), first
    assert "128 of its 512, in runs of 128" in first and "another tensor_parallel_size" in first
    assert second.startswith("ValueError: quantization: layers.0.down is stored with scales for 128 inputs"), second
    assert "342 of its 1024" in second
