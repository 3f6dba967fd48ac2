"""The flags of `python -m engine.serve`."""

from __future__ import annotations

import subprocess
import sys

import pytest
from absl import flags

from engine.command_line import normalize
from engine.config import EngineConfig
from engine.serve import define
from engine.server import ServerOptions

FLAGS = flags.FlagValues()
define(FLAGS)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--max-num-seqs=4", "--max_num_seqs=4"),
        ("--max_num_seqs=4", "--max_num_seqs=4"),
        ("--served-model-name=my-model", "--served_model_name=my-model"),
        ("--no-enable-prefix-caching", "--noenable_prefix_caching"),
        ("--enable-prefix-caching", "--enable_prefix_caching"),
        ("some-value", "some-value"),
        ("-1", "-1"),
    ],
)
def test_dashes_and_underscores_are_alike(given, meant):
    assert normalize(["serve", given], FLAGS) == ["serve", meant]


def test_what_follows_two_dashes_is_left_alone():
    assert normalize(["serve", "--a-b", "--", "--c-d"], FLAGS) == ["serve", "--a_b", "--", "--c-d"]


def test_every_setting_of_the_server_that_has_a_flag_has_the_flags_default():
    options = ServerOptions(served_model_name=("m",))
    for name in ("host", "port", "max_queue", "max_queue_tokens", "shutdown_timeout", "timeout_keep_alive"):
        assert FLAGS[name].default == getattr(options, name)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "model: name a GGUF file"),
        (["--model", "m", "--port", "70000"], "port: must be in [0, 65535], got 70000"),
        (["--model", "m", "--max-queue", "-1"], "max_queue: must be at least 0, got -1"),
        (["--model", "m", "--api-key", ""], "api_key: a key must not be empty"),
        (["--model", "m", "--block-size", "17"], "block_size"),
        (["--model", "m", "--tool-call-parser", "x"], "tool_call_parser"),
        (["--model", "m", "stray"], "unexpected argument 'stray'"),
        (["--model", "m", "--no-such-flag"], "no_such_flag"),
    ],
)
def test_wrong_flags_are_named_before_anything_starts(arguments, told):
    command = [sys.executable, "-m", "engine.serve", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert told in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_importing_the_server_does_not_import_jax():
    code = "import sys, engine.serve; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_config_is_made_from_flags():
    assert {"max_num_seqs", "max_model_len", "chat_template"} <= {
        f for f in EngineConfig.__dataclass_fields__ if f in FLAGS
    }
