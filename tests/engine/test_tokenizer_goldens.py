"""llama.cpp's golden tokenizations, on the part of each model's vocabulary that they can meet.

The file is made by `scripts/check_tokenizers.py --sample`, which checks the whole vocabularies; it numbers the tokens
that are left anew.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from engine.vocab import tokenizer_from_gguf

GOLDENS = json.loads((pathlib.Path(__file__).parents[1] / "data" / "tokenizer_goldens.json").read_text())


@pytest.mark.parametrize("name", GOLDENS)
def test_real_vocabularies_tokenize_as_the_goldens_say(name: str):
    golden = GOLDENS[name]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in golden["metadata"].items()}
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if key in metadata:
            metadata[key] = np.array(metadata[key])
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False})
    assert len(golden["cases"]) >= 46
    for text, ids in golden["cases"]:
        assert tokenizer.encode(text) == ids, text
