"""speculative_config: what it may say."""

from __future__ import annotations

import pytest
from absl import flags

from engine.config import EngineConfig, config_from_flags, define_flags
from engine.speculative_config import METHODS, SpeculativeConfig, read_speculative_config

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


def test_keys_of_a_method_become_settings():
    assert read_speculative_config(NGRAM | {"prompt_lookup_max": 7}) == SpeculativeConfig(
        "ngram", 4, prompt_lookup_min=2, prompt_lookup_max=7
    )
    assert read_speculative_config(NGRAM | {"prompt_lookup_max": 1}).prompt_lookup_min == 1
    assert read_speculative_config(NGRAM | {"prompt_lookup_min": 8}).prompt_lookup_max == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": None}, "method must be one of ngram, suffix, draft_model, eagle3, mtp, got None"),
        ({"method": "medusa"}, "method must be one of"),
        ({"num_speculative_tokens": None}, "num_speculative_tokens is missing; give 1 to 32"),
        ({"num_speculative_tokens": 0}, r"num_speculative_tokens must be in \[1, 32\], got 0"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens must be of type int, got True"),
        ({"num_speculative_tokens": 2.0}, "num_speculative_tokens must be of type int"),
        ({"prompt_lookup_min": 5, "prompt_lookup_max": 3}, "prompt_lookup_min 5 is more than prompt_lookup_max 3"),
        ({"model": "m"}, "model is not supported with method 'ngram'"),
        ({"draft_tensor_parallel_size": 1}, "draft_tensor_parallel_size is not supported"),
        ({"adaptive": 1}, "adaptive must be true or false"),
        ({"method": "draft_model"}, "model is missing"),
        ({"method": "draft_model", "model": 3}, "model must name a checkpoint"),
        ({"benchmark_forced_acceptance": float("nan")}, "benchmark_forced_acceptance must be of type float"),
    ],
)
def test_what_it_may_not_say_is_an_error_that_names_the_key(changes: dict, message: str):
    with pytest.raises(ValueError, match=f"speculative_config: {message}"):
        EngineConfig(model="m", speculative_config=NGRAM | changes)


def test_every_method_is_told_from_the_command_line():
    values = flags.FlagValues()
    define_flags(values)
    values(["program", "--model=m", '--speculative_config={"method": "ngram", "num_speculative_tokens": 3}'])
    assert config_from_flags(values).speculative_config == {"method": "ngram", "num_speculative_tokens": 3}
    assert all(name in values["speculative_config"].help for name in METHODS)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "nothing"])
def test_json_that_is_none_is_refused(text: str):
    values = flags.FlagValues()
    define_flags(values)
    values(["program", "--model=m", f"--speculative_config={text}"])
    with pytest.raises(ValueError, match="speculative_config: not valid JSON"):
        config_from_flags(values)


def test_json_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="speculative_config: must be of type dict"):
        EngineConfig(model="m", speculative_config=[])  # type: ignore[arg-type]
