"""Converted checkpoints: the same parameters and tokens as before, onto any sharding; broken folders are refused."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.convert import convert
from engine.tokenizer_files import load_tokenizer
from engine.weights.load import load_params, open_checkpoint
from tests.engine.buckets import few_buckets

ROOT = pathlib.Path(__file__).parents[3]
TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny"
MODELS = sorted(file.parent for file in TINY.glob("*/model.safetensors"))
MODEL = TINY / "qwen3"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("converted") / "qwen3"
    convert(str(MODEL), folder, "float32")
    return folder


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_config_and_parameters_come_back_as_they_were(folder, tmp_path):
    count = convert(str(folder), tmp_path / "orbax", "float32")
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "orbax")
    assert after.config == before.config
    loaded, restored = load_params(before, "float32"), load_params(after, "float32")
    jax.tree.map(np.testing.assert_array_equal, restored, loaded)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [leaf.dtype for leaf in jax.tree.leaves(loaded)]
    assert count == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))


def test_a_converted_model_generates_the_same_tokens(converted):
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0)
    answers = []
    for model in (MODEL, converted):
        with few_buckets():
            llm = LLM(model=str(model), skip_tokenizer_init=True, max_num_seqs=1, max_num_batched_tokens=16)
        (output,) = llm.generate([list(range(3, 40))], params, use_tqdm=False)
        answers.append((output.outputs[0].token_ids, output.prompt_logprobs))
    assert answers[0] == answers[1]


def test_a_gguf_model_keeps_its_tokenizer(smollm2_gguf, tmp_path):
    convert(str(smollm2_gguf), tmp_path / "orbax", "bfloat16")
    before, after = load_tokenizer(smollm2_gguf), load_tokenizer(tmp_path / "orbax")
    text = "The capital of France is Paris.\n\tfor i in range(10): 🙂"
    assert after.encode(text) == before.encode(text)
    assert (after.eos_token_ids, after.chat_template) == (before.eos_token_ids, before.chat_template)
    params = load_params(open_checkpoint(tmp_path / "orbax"), "float32")
    expected = load_params(open_checkpoint(smollm2_gguf), "bfloat16")
    assert params["embed"].dtype == np.float32
    np.testing.assert_array_equal(params["embed"], np.asarray(expected["embed"], np.float32))


def test_what_is_there_is_not_overwritten(converted):
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        convert(str(MODEL), converted, "float32")


def change(converted: pathlib.Path, to: pathlib.Path, edit: Callable[[dict[str, Any]], Any]) -> pathlib.Path:
    """-> a copy of the folder whose quire.json is edited, or replaced by what the edit returns."""
    shutil.copytree(converted, to)
    values = json.loads((to / "quire.json").read_text())
    text = edit(values)
    (to / "quire.json").write_text(text if isinstance(text, str) else json.dumps(values))
    return to


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(version=2), "version: 2 is not supported, 1 is; convert the model again"),
        (lambda v: v.update(format="other"), "format: is not 'quire'"),
        (lambda v: v.pop("model"), "Expected `object`, got `null`"),
        (lambda v: v["model"].pop("head_dim"), "missing required field `head_dim`"),
        (lambda v: v["model"].update(num_wings=2), "model.num_wings: unknown; the folder was made by another version"),
        (lambda v: v["model"]["layers"][1].update(wings=2), "model.layers.1.wings: unknown"),
        (lambda v: v["model"].update(hidden_size="32"), r"Expected `int`, got `str` - at `\$.hidden_size`"),
        (lambda v: v["model"].update(hidden_size=-32), "hidden_size: is out of range: -32"),
        (lambda v: v["model"].update(vocab_size=2**40), "vocab_size: is out of range"),
        (lambda v: v["model"].update(num_kv_heads=3), "4 are no multiple of 3 KV heads"),
        (lambda v: v["model"].update(activation="relu6"), "activation: 'relu6' is not one of"),
        (lambda v: v["model"].update(qk_norm="tail"), "qk_norm: 'tail' is not one of"),
        (lambda v: v["model"].update(family="bert"), "family: 'bert' is not one of"),
        (lambda v: v["model"].update(layers=[]), "layers: 0 are not 1 to"),
        (lambda v: v["model"]["layers"][2]["rope"].update(dim=18), "rope over 18 of 16 dimensions is not possible"),
        (lambda v: v["model"]["layers"][0]["rope"].update(kind="other"), "rope 'other'"),
        (lambda v: v["model"]["layers"][0]["rope"].update(theta=1e300), "theta: is out of range"),
        (lambda v: v["model"]["layers"][0]["rope"].update(kind="yarn", theta=1.0), "rope 'yarn'"),
        (lambda v: "{" * 100_000, "quire.json"),
        (lambda v: '{"format": "quire", "version": NaN}', "quire.json"),
        (lambda v: "", "quire.json"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(converted, tmp_path, edit, message):
    folder = change(converted, tmp_path / "folder", edit)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(folder)
    assert "quire.json" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda v: v["model"].update(qk_norm=None),
            "not part of the model: layers.0.k_norm, layers.0.q_norm",
        ),
        (lambda v: v["model"].update(qkv_bias=True), "parameters are missing: layers.0.qkv_bias, layers.1.qkv_bias"),
        (lambda v: v["model"].update(vocab_size=161), r"embed has shape \(160, 32\), but quire.json says \(161, 32\)"),
        (lambda v: v["model"]["layers"].pop(), "not part of the model: layers.2.attn_norm, layers.2.down"),
    ],
)
def test_a_config_that_contradicts_the_parameters_names_them(converted, tmp_path, edit, message):
    checkpoint = open_checkpoint(change(converted, tmp_path / "folder", edit))
    with pytest.raises(ValueError, match=message):
        load_params(checkpoint, "float32")


def test_damage_is_an_error_that_names_the_folder(converted, tmp_path):
    folders = []
    for name in ("_METADATA", "manifest.ocdbt", "**/d/*"):
        for kind, damage in (("gone", pathlib.Path.unlink), ("garbage", lambda file: file.write_bytes(bytes(300)))):
            folder = change(converted, tmp_path / f"{len(folders)}-{kind}", lambda values: None)
            for file in sorted((folder / "params").glob(name)):
                damage(file)
            folders.append(folder)
    # In a process of its own: Orbax's other reads complain from their threads after the first has failed.
    code = (
        "import pathlib, sys; from engine.weights.load import load_params, open_checkpoint\n"
        "for folder in sys.argv[1:]:\n"
        "    try: load_params(open_checkpoint(pathlib.Path(folder)), 'float32')\n"
        "    except ValueError as error: print(str(error).splitlines()[0])"
    )
    command = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{folder}/params: ")
