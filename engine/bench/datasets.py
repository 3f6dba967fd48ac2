"""What a benchmark asks for: prompts with their output lengths, random or out of files, the same for the same seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from engine.tokenizer import Tokenizer

Prompt = str | list[int]


@dataclass(frozen=True)
class Sample:
    """One request: its prompt, and how many tokens to generate."""

    prompt: Prompt
    output_len: int


def define_dataset_flags(values: flags.FlagValues, *, num_prompts: int = 1000) -> None:
    """Define --dataset-name and everything that the datasets ask for, under vLLM's names."""
    integer, number = flags.DEFINE_integer, flags.DEFINE_float
    at: Any = {"flag_values": values}
    flags.DEFINE_enum("dataset_name", "random", list(DATASETS), "Where the prompts come from.", **at)
    flags.DEFINE_string("dataset_path", None, "The file of the datasets sharegpt, text and custom.", **at)
    integer("num_prompts", num_prompts, "Number of requests.", lower_bound=1, **at)
    integer("random_input_len", 1024, "random: tokens of a prompt after its prefix.", lower_bound=1, **at)
    integer("random_output_len", 128, "random: tokens to generate.", lower_bound=1, **at)
    integer("random_prefix_len", 0, "random: tokens that all prompts begin with.", lower_bound=0, **at)
    number(
        "random_range_ratio", 0.0, "random: lengths are drawn from [length (1 - r), length (1 + r)].",
        lower_bound=0, upper_bound=0.999, **at,
    )  # fmt: skip
    integer("sharegpt_output_len", None, "sharegpt: tokens to generate; default: as many as the answer has.", **at)
    integer("text_input_len", 550, "text: tokens of a prompt, cut from anywhere in the file.", lower_bound=1, **at)
    integer("text_output_len", 150, "text: tokens to generate.", lower_bound=1, **at)
    integer("custom_output_len", 256, "custom: tokens to generate where a line has no output_tokens.", **at)
    prefix = "prefix_repetition: "
    integer("prefix_repetition_prefix_len", 256, prefix + "tokens of a prefix.", lower_bound=1, **at)
    integer("prefix_repetition_suffix_len", 256, prefix + "tokens of what follows it.", lower_bound=1, **at)
    integer("prefix_repetition_num_prefixes", 10, prefix + "how many prefixes there are.", lower_bound=1, **at)
    integer("prefix_repetition_output_len", 128, prefix + "tokens to generate.", lower_bound=1, **at)


def load_samples(values: flags.FlagValues, tokenizer: Tokenizer | None, vocab_size: int, seed: int) -> list[Sample]:
    """-> --num-prompts requests of the dataset that the flags name. Files are repeated if they hold fewer.

    Errors: ValueError that names the flag, or the file and its line.
    """
    source = Source(values, tokenizer, vocab_size, np.random.default_rng(seed))
    samples = DATASETS[values.dataset_name](source)
    if not samples:
        raise ValueError(f"dataset_path: {values.dataset_path} holds no prompt that could be used")
    count = values.num_prompts
    return (samples * (-(-count // len(samples))))[:count]


@dataclass(frozen=True)
class Source:
    """What a dataset draws from."""

    values: flags.FlagValues
    tokenizer: Tokenizer | None
    vocab_size: int
    random: np.random.Generator

    def ids(self, count: int) -> list[int]:
        """-> random token ids, none of them special."""
        special = set(self.tokenizer.eos_token_ids) if self.tokenizer else set()
        if self.tokenizer is not None:
            special |= {i for i, token in self.tokenizer.backend.get_added_tokens_decoder().items() if token.special}
        drawn = self.random.integers(0, self.vocab_size, count).tolist()
        return [token if token not in special else next(i for i in range(self.vocab_size) if i not in special)
                for token in drawn]  # fmt: skip

    def need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"tokenizer: the dataset {self.values.dataset_name} needs one; give --tokenizer")
        return self.tokenizer

    def file(self) -> Path:
        if self.values.dataset_path is None:
            raise ValueError(f"dataset_path: the dataset {self.values.dataset_name} needs it")
        path = Path(self.values.dataset_path)
        if not path.is_file():
            raise ValueError(f"dataset_path: there is no file {path}")
        return path


def _random(source: Source) -> list[Sample]:
    values, count = source.values, source.values.num_prompts
    prefix = source.ids(values.random_prefix_len)

    def lengths(mean: int) -> list[int]:
        ratio = values.random_range_ratio
        low, high = max(1, int(mean * (1 - ratio))), max(1, int(np.ceil(mean * (1 + ratio))))
        return source.random.integers(low, high + 1, count).tolist()

    inputs, outputs = lengths(values.random_input_len), lengths(values.random_output_len)
    return [Sample(prefix + source.ids(n), m) for n, m in zip(inputs, outputs, strict=True)]


def _prefix_repetition(source: Source) -> list[Sample]:
    values = source.values
    prefixes = [source.ids(values.prefix_repetition_prefix_len) for _ in range(values.prefix_repetition_num_prefixes)]
    of_each = -(-values.num_prompts // len(prefixes))
    suffix, output = values.prefix_repetition_suffix_len, values.prefix_repetition_output_len
    samples = [Sample(prefix + source.ids(suffix), output) for prefix in prefixes for _ in range(of_each)]
    return [samples[i] for i in source.random.permutation(len(samples))]


def _sharegpt(source: Source) -> list[Sample]:
    """Conversations' first questions, with answers as long as theirs; very short and very long ones are left out."""
    encode, path = source.need_tokenizer().encode, source.file()
    conversations = _json(path)
    if not isinstance(conversations, list):
        raise ValueError(f"{path}: must hold a list of conversations")
    samples: list[Sample] = []
    for i in source.random.permutation(len(conversations)):
        turns = conversations[i].get("conversations", ()) if isinstance(conversations[i], dict) else ()
        if len(turns) < 2:
            continue
        try:
            question, answer = (turn["value"] for turn in turns[:2])
            input_len, answer_len = len(encode(question)), len(encode(answer, add_special_tokens=False))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: conversation {i}: each turn needs a text `value`: {error!r}") from None
        output_len = source.values.sharegpt_output_len or answer_len
        if min(input_len, answer_len) >= 4 and input_len <= 1024 and input_len + output_len <= 2048:
            samples.append(Sample(question, output_len))
        if len(samples) == source.values.num_prompts:
            break
    return samples


def _text(source: Source) -> list[Sample]:
    values, tokenizer, path = source.values, source.need_tokenizer(), source.file()
    ids = tokenizer.encode(path.read_text("utf-8"), add_special_tokens=False)
    if len(ids) < values.text_input_len:
        raise ValueError(f"text_input_len: {values.text_input_len} tokens, and {path} has {len(ids)}")
    starts = source.random.integers(0, len(ids) - values.text_input_len + 1, values.num_prompts).tolist()
    return [Sample(ids[at : at + values.text_input_len], values.text_output_len) for at in starts]


def _custom(source: Source) -> list[Sample]:
    """A line is {"prompt": text or token ids, "output_tokens": optional}."""
    path, samples = source.file(), []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, output = row["prompt"], row.get("output_tokens", source.values.custom_output_len)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f'{path}:{number}: must be {{"prompt": ...}} in JSON: {error!r}') from None
        is_ids = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
        if not (is_ids or (isinstance(prompt, str) and prompt)) or type(output) is not int or output < 1:
            raise ValueError(f"{path}:{number}: prompt must be text or token ids, output_tokens a positive integer")
        samples.append(Sample(prompt, output))
    return samples


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


DATASETS: dict[str, Callable[[Source], list[Sample]]] = {
    "random": _random,
    "sharegpt": _sharegpt,
    "text": _text,
    "custom": _custom,
    "prefix_repetition": _prefix_repetition,
}


def as_text(samples: Sequence[Sample], tokenizer: Tokenizer) -> list[Sample]:
    """-> the samples with text for prompts; ids may merge when the text is read, so lengths are nearly the same."""
    return [
        sample if isinstance(sample.prompt, str) else Sample(_stable_text(sample.prompt, tokenizer), sample.output_len)
        for sample in samples
    ]


def _stable_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """-> a text whose tokens are as many as the ids: what merges is made up for from the ids' beginning."""
    wanted, text = len(ids), tokenizer.decode(ids, skip_special_tokens=False)
    for _ in range(8):
        found = tokenizer.encode(text, add_special_tokens=False)
        if len(found) == wanted:
            break
        found = found[:wanted] if len(found) > wanted else found + ids[: wanted - len(found)]
        text = tokenizer.decode(found, skip_special_tokens=False)
    return text
