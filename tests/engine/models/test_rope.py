"""The frequencies of every kind of rope scaling are those of transformers, at short and at long lengths."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace

import numpy as np
import pytest

from engine.models.config import RopeSpec
from engine.models.read import from_hugging_face
from engine.models.rope import frequencies

GOLDENS = json.loads((pathlib.Path(__file__).parents[2] / "data" / "rope_frequencies.json").read_text())
CONFIG = dict(
    architectures=["LlamaForCausalLM"], hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, vocab_size=60, max_position_embeddings=256,
)  # fmt: skip


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["rope_parameters"]["rope_type"])
def test_frequencies_and_attention_factor_are_those_of_transformers(golden: dict):
    _, config = from_hugging_face("config.json", CONFIG | {"rope_parameters": golden["rope_parameters"]})
    rope = config.layers[0].rope
    assert rope is not None
    for length, expected in golden["frequencies"].items():
        np.testing.assert_allclose(frequencies(rope, int(length)), np.array(expected, np.float32), rtol=1e-6)
    assert rope.attention_factor == pytest.approx(golden["attention_factor"])


def test_dynamic_scaling_starts_beyond_the_original_length():
    plain, scaled = RopeSpec(8, 500.0), RopeSpec(8, 500.0, "dynamic", factor=4.0, original_max_len=32)
    np.testing.assert_array_equal(frequencies(scaled, 16), frequencies(plain, 16))
    np.testing.assert_array_equal(frequencies(scaled, 32), frequencies(plain, 32))
    # at twice the length: theta * (4 * 2 - 3) ^ (8 / 6)
    np.testing.assert_allclose(frequencies(scaled, 64), frequencies(replace(plain, theta=500.0 * 5 ** (8 / 6)), 64))


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 256),
    ],
)
def test_scaling_that_stretches_the_context_says_how_far(scaling: dict, longest: int):
    assert from_hugging_face("config.json", CONFIG | {"rope_scaling": scaling})[1].max_model_len == longest
