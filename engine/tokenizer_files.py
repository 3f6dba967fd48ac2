"""load_tokenizer: a tokenizer from a GGUF file or a Hugging Face folder. Nothing in either is executed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from engine.tokenizer import Tokenizer
from engine.vocab import tokenizer_from_gguf
from engine.weights.gguf import VOCABULARY_NAME, open_gguf


def load_tokenizer(path: Path) -> Tokenizer:
    """-> the tokenizer of a .gguf file, or of a folder with tokenizer.json or, from `engine.convert`, tokenizer.gguf.

    Errors: ValueError that names the file and what is wrong with it.
    """
    if (path / VOCABULARY_NAME).is_file():
        path = path / VOCABULARY_NAME
    if path.is_file() and path.suffix == ".gguf":
        with open_gguf(path) as file:
            try:
                return tokenizer_from_gguf(file.metadata)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    if not path.is_dir():
        raise ValueError(f"tokenizer: {path} is neither a .gguf file nor a folder with tokenizer.json")
    return _from_folder(path)


def _from_folder(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"tokenizer: {folder} has no tokenizer.json; save a fast tokenizer there")
    try:
        source = _auto_tokenizer().from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        backend = source.backend_tokenizer
    except Exception as error:  # whatever the parsers of that library raise at a file they can't take
        raise ValueError(f"tokenizer: {folder} cannot be loaded: {type(error).__name__}: {error}") from error
    # Some models end a turn with another token than a text: their generation_config.json lists both.
    eos = dict.fromkeys(
        ([] if source.eos_token_id is None else [source.eos_token_id])
        + _eos_token_ids(folder / "generation_config.json")
        + _eos_token_ids(folder / "config.json")
    )
    return Tokenizer(
        backend,
        eos_token_ids=tuple(eos),
        bos_token_id=source.bos_token_id,
        chat_template=source.chat_template,
        special_tokens={name: str(token) for name, token in source.special_tokens_map.items()},
    )


def _auto_tokenizer() -> Any:
    """-> transformers.AutoTokenizer, imported when it is needed: that takes a second."""
    logger = logging.getLogger("transformers")
    quiet = lambda record: "PyTorch" not in record.getMessage()  # it advises users to install what we don't need
    logger.addFilter(quiet)
    try:
        from transformers import AutoTokenizer
    finally:
        logger.removeFilter(quiet)
    return AutoTokenizer


def _eos_token_ids(file: Path) -> list[int]:
    """-> eos_token_id of a config file, also of the text part of a multimodal one; [] if there is none."""
    if not file.is_file():
        return []
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: must hold an object, got {type(config).__name__}")
    text = config.get("text_config")
    value = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise ValueError(f"{file}: eos_token_id: must be a token id or a list of them, got {value!r:.80}")
    return ids
