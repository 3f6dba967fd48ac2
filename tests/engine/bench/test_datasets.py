"""Datasets: lengths are those asked for, files are read or refused by line."""

from __future__ import annotations

import json

import pytest
from absl import flags

from engine.bench.datasets import Sample, as_text, define_dataset_flags, load_samples
from engine.command_line import parse
from tests.engine.server.fake_core import make_tokenizer


def load(*arguments: str, seed: int = 0) -> list[Sample]:
    values, tokenizer = flags.FlagValues(), make_tokenizer()
    define_dataset_flags(values)
    parse(values, ["bench", *arguments])
    return load_samples(values, tokenizer, tokenizer.vocab_size, seed)


def test_random_prompts_share_their_prefix_and_nothing_else():
    samples = load("--num-prompts=20", "--random-input-len=30", "--random-prefix-len=10", "--random-output-len=7")
    assert {(len(s.prompt), s.output_len) for s in samples} == {(40, 7)}
    assert len({tuple(s.prompt[:10]) for s in samples}) == 1
    assert len({tuple(s.prompt[10:14]) for s in samples}) == 20
    assert all(0 <= token < 256 for s in samples for token in s.prompt)  # 256 and 257 are special


def test_a_range_ratio_spreads_lengths_on_both_sides():
    samples = load("--num-prompts=500", "--random-input-len=100", "--random-output-len=50", "--random-range-ratio=0.2")
    inputs, outputs = [len(s.prompt) for s in samples], [s.output_len for s in samples]
    assert (min(inputs), max(inputs)) == (80, 120)
    assert (min(outputs), max(outputs)) == (40, 60)


def test_a_seed_draws_the_same_samples():
    asked = ("--num-prompts=5", "--random-range-ratio=0.5")
    assert load(*asked, seed=3) == load(*asked, seed=3) != load(*asked, seed=4)


def test_prefixes_repeat_as_often_as_they_should():
    names = ("prefix-len=6", "suffix-len=4", "num-prefixes=3", "output-len=2")
    samples = load("--dataset-name=prefix_repetition", "--num-prompts=12", *(f"--prefix-repetition-{n}" for n in names))
    prefixes = [tuple(s.prompt[:6]) for s in samples]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [4, 4, 4]
    assert {(len(s.prompt), s.output_len) for s in samples} == {(10, 2)}


def test_sharegpt_takes_first_turns_of_fit_lengths(tmp_path):
    turns = lambda *texts: {"conversations": [{"from": "human", "value": text} for text in texts]}
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([turns("hello", "world!"), turns("hm", "too short"), turns("x" * 1100, "long"), {}]))
    asked = ("--dataset-name=sharegpt", f"--dataset-path={file}", "--num-prompts=2")
    assert load(*asked) == [Sample("hello", 6)] * 2
    assert load(*asked, "--sharegpt-output-len=9")[0].output_len == 9


def test_a_text_is_cut_anywhere(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("abcdefghijklmnopqrstuvwxyz" * 4)
    samples = load("--dataset-name=text", f"--dataset-path={file}", "--text-input-len=10", "--num-prompts=30")
    texts = {make_tokenizer().decode(s.prompt) for s in samples}
    assert len(texts) > 5
    assert all(text in file.read_text() and len(text) == 10 for text in texts)


def test_lines_of_prompts_are_text_or_ids_each_with_its_length(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hi", "output_tokens": 3}\n\n{"prompt": [1, 2]}\n')
    asked = ("--dataset-name=custom", f"--dataset-path={file}", "--num-prompts=3", "--custom-output-len=8")
    assert load(*asked) == [Sample("hi", 3), Sample([1, 2], 8), Sample("hi", 3)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("custom", '{"prompt": "x"}\n{"prompt"', r"data:2: must be \{\"prompt\""),
        ("custom", '{"text": "x"}', "data:1: must be"),
        ("custom", '{"prompt": []}', "data:1: prompt must be text or token ids"),
        ("custom", '{"prompt": "x", "output_tokens": 0}', "output_tokens a positive integer"),
        ("custom", "", "holds no prompt"),
        ("sharegpt", "{", "data: not valid JSON"),
        ("sharegpt", "{}", "data: must hold a list"),
        ("sharegpt", '[{"conversations": [{}, {}]}]', "conversation 0"),
        ("sharegpt", "[]", "holds no prompt"),
        ("text", "short", "text_input_len: 550 tokens, and .* has 5"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, name, content, told):
    file = tmp_path / "data"
    file.write_text(content)
    with pytest.raises(ValueError, match=told):
        load(f"--dataset-name={name}", f"--dataset-path={file}")


def test_a_file_must_be_named_and_be_there():
    with pytest.raises(ValueError, match="dataset_path: the dataset custom needs it"):
        load("--dataset-name=custom")
    with pytest.raises(ValueError, match="there is no file /no/such"):
        load("--dataset-name=custom", "--dataset-path=/no/such")


def test_prompts_become_text_of_about_their_length():
    tokenizer = make_tokenizer()
    for sample in as_text(load("--num-prompts=5", "--random-input-len=40"), tokenizer):
        assert isinstance(sample.prompt, str)
        assert len(tokenizer.encode(sample.prompt)) == pytest.approx(40, rel=1.5)  # a byte of no text becomes three
