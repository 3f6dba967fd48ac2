"""load_tokenizer: Hugging Face folders good and bad, and that start-up doesn't wait for what it doesn't need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.tokenizer_files import load_tokenizer
from tests.engine.tokenizers_for_tests import CHAT_TEMPLATE, byte_level_backend

CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def write_folder(folder: Path, **configs: Any) -> Path:
    """Write tokenizer.json, and each of `configs` as NAME.json; strings as they are."""
    byte_level_backend().save(str(folder / "tokenizer.json"))
    for name, config in {"tokenizer_config": CONFIG, **configs}.items():
        (folder / f"{name}.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_a_folders_tokenizer_is_the_files(tmp_path: Path):
    tokenizer = load_tokenizer(write_folder(tmp_path))
    backend = byte_level_backend()
    assert tokenizer.encode("<s>hello world </s><a b>é") == backend.encode("<s>hello world </s><a b>é").ids
    assert tokenizer.bos_token_id == backend.token_to_id("<s>")
    assert tokenizer.eos_token_ids == (backend.token_to_id("</s>"),)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [({"eos_token_id": [7, 8]}, {"eos_token_id": 7}, (7, 8)), ({}, {"text_config": {"eos_token_id": [9]}}, (9,))],
)
def test_every_id_that_ends_a_text_is_found(tmp_path: Path, generation: Any, config: Any, ids: tuple[int, ...]):
    folder = write_folder(tmp_path, generation_config=generation, config={"model_type": "unheard-of", **config})
    assert load_tokenizer(folder).eos_token_ids == (byte_level_backend().token_to_id("</s>"), *ids)


def test_the_chat_template_is_found_wherever_it_is(tmp_path: Path):
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": CHAT_TEMPLATE}]
    for template in (CHAT_TEMPLATE, named):
        folder = write_folder(tmp_path, tokenizer_config={**CONFIG, "chat_template": template})
        assert load_tokenizer(folder).chat_template == CHAT_TEMPLATE
    assert load_tokenizer(folder).chat_templates == {"default": CHAT_TEMPLATE, "tool_use": "other"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("third")
    (tmp_path / "chat_template.jinja").write_text("{{ 'from the file' }}")
    tokenizer = load_tokenizer(write_folder(tmp_path))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "from the file"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template="rag") == "third"


def test_special_tokens_may_be_objects(tmp_path: Path):
    bos = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
    config = CONFIG | {"bos_token": bos, "additional_special_tokens": ["<x>"], "pad_token": None}
    tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_config=config))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.decode(tokenizer.encode("hello<x>")) == "hello"


def test_nothing_in_a_folder_is_executed(tmp_path: Path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": [None, "evil.Evil"], "AutoConfig": "evil.Evil"}
    config = {"model_type": "evil", "auto_map": auto_map}
    folder = write_folder(
        tmp_path, config=config, tokenizer_config={**CONFIG, "tokenizer_class": "Evil", "auto_map": auto_map}
    )
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer", "{", "cannot be loaded"),
        ("tokenizer", '{"model": 5}', "cannot be loaded"),
        ("tokenizer", "[" * 5000, "cannot be loaded"),
        ("tokenizer_config", "[]", "cannot be loaded"),
        ("generation_config", "{", "generation_config.json: not valid JSON"),
        ("generation_config", "[1]", "generation_config.json: must hold an object"),
        ("generation_config", '{"eos_token_id": [1, -1]}', "generation_config.json: eos_token_id"),
        ("generation_config", '{"eos_token_id": true}', "generation_config.json: eos_token_id"),
        ("generation_config", "[" * 100_000, "generation_config.json: not valid JSON"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, message: str):
    folder = write_folder(tmp_path)
    (folder / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert str(tmp_path) in str(error.value)


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="neither a .gguf file nor a folder"):
        load_tokenizer(tmp_path / "nothing")


def test_a_broken_gguf_file_is_named(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="x.gguf"):
        load_tokenizer(tmp_path / "x.gguf")


def test_a_gguf_files_tokenizer_comes_without_slow_imports(smollm2_gguf: Path):
    code = (
        "import sys, pathlib; from engine.tokenizer_files import load_tokenizer;"
        "from engine.detokenizer import Detokenizer; load_tokenizer(pathlib.Path(sys.argv[1]));"
        "print(*sorted({'jax', 'transformers', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, smollm2_gguf], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
