"""Quantized folders: what each method's tensors stand for, by its own rules written out here; what is refused."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from engine.weights.load import load_params, open_checkpoint, quantization_of
from kernels.product import product
from tests.engine.weights.test_packed import as_the_model_sees

D, F, HEADS, KV_HEADS, H, V = 64, 128, 4, 2, 32, 40
MODULES = {
    "self_attn.q_proj": (HEADS * H, D), "self_attn.k_proj": (KV_HEADS * H, D), "self_attn.v_proj": (KV_HEADS * H, D),
    "self_attn.o_proj": (D, HEADS * H), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
}  # fmt: skip
CONFIG = dict(
    architectures=["LlamaForCausalLM"], hidden_size=D, intermediate_size=F, num_hidden_layers=1,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=H, vocab_size=V, max_position_embeddings=64,
    rms_norm_eps=1e-5,
)  # fmt: skip
G = 32  # inputs that share a scale
Pair = tuple[dict[str, np.ndarray], np.ndarray]  # a module's tensors, and the weight that they stand for


def pack_int32(values: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """uint8 [*, 8 n] -> int32 [*, n]: nibble i of an int32 is value order[i] of its eight."""
    eights = values.reshape(*values.shape[:-1], -1, 8).astype(np.uint32)
    packed = sum(eights[..., order[i]] << np.uint32(4 * i) for i in range(8))
    return np.asarray(packed, np.uint32).view(np.int32)


def draw(seed: int, out: int, inputs: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> values below 16 [out, in], scales [out, groups] and zeros [out, groups]."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.01, 0.1, (out, groups)).astype(np.float16)
    return rng.integers(0, 16, (out, inputs), np.uint8), scales, rng.integers(0, 16, (out, groups), np.uint8)


def stands_for(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    spread = lambda a: np.repeat(a.astype(np.float32), values.shape[1] // a.shape[1], axis=1)
    return (values.astype(np.float32) - spread(zeros)) * spread(scales)


def awq(seed: int, out: int, inputs: int) -> Pair:
    values, scales, zeros = draw(seed, out, inputs, inputs // G)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": pack_int32(values.T, order), "qzeros": pack_int32(zeros.T, order), "scales": scales.T}
    return tensors, stands_for(values, scales, zeros)


def gptq(seed: int, out: int, inputs: int, symmetric: bool = False) -> Pair:
    values, scales, zeros = draw(seed, out, inputs, inputs // G)
    zeros = np.full_like(zeros, 8) if symmetric else np.maximum(zeros, 1)
    tensors = {
        "qweight": pack_int32(values).T, "qzeros": pack_int32(zeros.T - np.uint8(1)), "scales": scales.T,
        "g_idx": (np.arange(inputs) // G).astype(np.int32),
    }  # fmt: skip
    return tensors, stands_for(values, scales, zeros)


def pack_quantized(seed: int, out: int, inputs: int, zeros_too: bool = True) -> Pair:
    values, scales, zeros = draw(seed, out, inputs, inputs // G)
    scales = scales.astype(ml_dtypes.bfloat16)
    tensors = {
        "weight_packed": pack_int32(values), "weight_scale": scales, "weight_shape": np.array([out, inputs]),
    } | ({"weight_zero_point": pack_int32(zeros.T).T} if zeros_too else {})  # fmt: skip
    return tensors, stands_for(values, scales, zeros if zeros_too else np.full_like(zeros, 8))


def fp8(seed: int, out: int, inputs: int, channels: bool = False) -> Pair:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out, inputs)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.1, 1, (out, 1) if channels else ()).astype(np.float32)
    tensors = {"weight": weight, "weight_scale": scale, "input_scale": np.float32(1).reshape(())}
    return tensors, weight.astype(np.float32) * scale


def fp8_blocks(seed: int, out: int, inputs: int) -> Pair:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out, inputs)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.1, 1, (-(-out // 128), -(-inputs // 128))).astype(np.float32)
    spread = scales.repeat(128, 0)[:out].repeat(128, 1)[:, :inputs]
    return {"weight": weight, "weight_scale_inv": scales}, weight.astype(np.float32) * spread


def int8(seed: int, out: int, inputs: int) -> Pair:
    rng = np.random.default_rng(seed)
    weight, scale = rng.integers(-127, 128, (out, inputs), np.int8), rng.random((out, 1), np.float32)
    return {"weight": weight, "weight_scale": scale}, weight.astype(np.float32) * scale


def compressed(format: str, inputs: dict | None = None, **weights: object) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
METHODS = {
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": G, "zero_point": True, "version": "gemm"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": G, "sym": False, "desc_act": False}),
    "gptq, symmetric": (
        lambda *a: gptq(*a, symmetric=True),
        {"quant_method": "gptq", "bits": 4, "group_size": G, "sym": True},
    ),
    "pack-quantized": (
        pack_quantized,
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=G),
    ),
    "pack-quantized, symmetric": (
        lambda *a: pack_quantized(*a, zeros_too=False),
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=G, symmetric=True),
    ),
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8, blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "float-quantized": (
        lambda *a: fp8(*a, channels=True),
        compressed("float-quantized", TOKEN | {"type": "float"}, num_bits=8, type="float", strategy="channel"),
    ),
    "int-quantized": (
        int8,
        compressed("int-quantized", TOKEN | {"type": "int"}, num_bits=8, type="int", strategy="channel"),
    ),
    "int-quantized, weights only": (int8, compressed("int-quantized", num_bits=8, type="int", strategy="channel")),
}


def save(folder: pathlib.Path, make, config: dict, change=lambda tensors: None) -> dict[str, np.ndarray]:
    """Write a model of one layer. -> the weights that it stands for, by module."""
    rng = np.random.default_rng(9)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((V, D)).astype(np.float32)}
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
        "model.norm.weight": np.ones(D, np.float32),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{norm}.weight"] = np.ones(D, np.float32)
    weights = {}
    for seed, (module, shape) in enumerate(MODULES.items()):
        parts, weights[module] = make(seed, *shape)
        tensors |= {f"model.layers.0.{module}.{name}": np.ascontiguousarray(part) for name, part in parts.items()}
    change(tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": config}))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return weights


def expected(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """-> the layer's parameters as the model sees them."""
    group = HEADS // KV_HEADS
    q, k, v, out, gate, up, down = (weights[name] for name in MODULES)
    heads = [q.reshape(KV_HEADS, group, H, D), k.reshape(KV_HEADS, 1, H, D), v.reshape(KV_HEADS, 1, H, D)]
    return {
        "qkv": np.moveaxis(np.concatenate(heads, axis=1), -1, 0),
        "out": out.T.reshape(KV_HEADS, group, H, D),
        "gate_up": np.stack([gate.T, up.T], axis=1),
        "down": down.T,
    }


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("setting", ["kept on a cpu", "kept on a gpu", "expanded"])
def test_a_folder_stands_for_what_its_method_says(tmp_path: pathlib.Path, name: str, setting: str):
    make, config = METHODS[name]
    weights = expected(save(tmp_path / "model", make, config))
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.method == config["quant_method"]
    method = "dequantize" if setting == "expanded" else checkpoint.method
    platform = "cpu" if "cpu" in setting else "gpu"
    params = load_params(checkpoint, "float32", quantization=quantization_of(checkpoint, method, platform, "float32"))
    for parameter, wanted in weights.items():
        found = params["layers"][0][parameter]
        assert isinstance(found, jnp.ndarray) == (setting == "expanded")
        seen = as_the_model_sees(parameter, found, wanted.shape)
        np.testing.assert_allclose(seen, wanted, rtol=1e-6, atol=1e-7)
    if setting == "kept on a cpu":
        x = np.random.default_rng(0).standard_normal((2, D)).astype(np.float32)
        y = np.asarray(product(jnp.asarray(x), params["layers"][0]["gate_up"]))
        exact = np.einsum("td,dpf->tpf", x, weights["gate_up"])
        assert np.abs(y - exact).max() <= 0.06 * np.abs(exact).max()  # activations may be narrow


def refused(tmp_path: pathlib.Path, make, config: dict, change=lambda tensors: None) -> str:
    save(tmp_path / "model", make, config, change)
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        checkpoint = open_checkpoint(tmp_path / "model")
        load_params(checkpoint, "float32", quantization=quantization_of(checkpoint, None, "gpu", "float32"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; fp8, mxfp4, awq, gptq,"),
        ("fp8", "quantization_config: must be an object with quant_method"),
        (METHODS["awq"][1] | {"bits": 3}, "bits 3 is not supported"),
        (METHODS["awq"][1] | {"version": "gemv"}, "version 'gemv' is not supported"),
        (METHODS["awq"][1] | {"group_size": 48}, "group_size 48 is not supported"),
        (METHODS["gptq"][1] | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        (METHODS["fp8"][1] | {"weight_block_size": [64, 64]}, "weight_block_size [64, 64] is not supported"),
        (compressed("marlin-24"), "format 'marlin-24' is not supported"),
        (compressed("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
        (compressed("int-quantized", num_bits=8, type="int", strategy="group"), "strategy 'group' is not supported"),
        (METHODS["pack-quantized"][1] | {"config_groups": {}}, "config_groups must hold one group"),
        (
            METHODS["pack-quantized"][1] | {"transform_config": {"config_groups": {"R4": {}}}},
            "transform_config {'config_groups': {'R4': {}}} is not supported",
        ),
        (
            METHODS["pack-quantized"][1] | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config: format 'sparse-24-bitmask' is not supported",
        ),
        (METHODS["pack-quantized"][1] | {"sparsity_config": "dense"}, "sparsity_config must be an object, got 'dense'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: pathlib.Path, config, message: str):
    assert message in refused(tmp_path, awq, config)


def without(name: str):
    return lambda tensors: tensors.pop(f"model.layers.0.{name}")


def put(name: str, value: np.ndarray):
    return lambda tensors: tensors.update({f"model.layers.0.{name}": value})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("awq", without("mlp.up_proj.scales"), "tensors are missing: model.layers.0.mlp.up_proj.scales"),
        ("awq", put("mlp.up_proj.scales", np.ones((3, F), np.float16)), "has shape (3, 128), expected (2, 128)"),
        ("awq", put("mlp.up_proj.qzeros", np.ones((2, F // 8), np.int64)), "must be of int32, are of int64"),
        ("gptq", put("mlp.up_proj.g_idx", np.arange(D, dtype=np.int32) % 2), "(desc_act, actorder) are not supported"),
        (
            "gptq, symmetric",
            put("mlp.up_proj.qzeros", np.zeros((2, F // 8), np.int32)),
            "zeros are not all in the middle",
        ),
        ("pack-quantized", put("mlp.up_proj.weight_scale", np.ones((F, 2), np.int32)), "scales must be of float32"),
        (
            "fp8",
            put("mlp.up_proj.weight_scale", np.ones(3, np.float32)),
            "have shape (3,), expected [128, 1]",
        ),
        ("int-quantized", put("mlp.up_proj.weight", np.ones((F, D), np.float32)), "int8 [out, in] is expected"),
        ("fp8", without("mlp.up_proj.weight"), "tensors are missing: model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_tensors_that_disagree_are_named(tmp_path: pathlib.Path, name: str, change, message: str):
    assert message in refused(tmp_path, *METHODS[name], change)
