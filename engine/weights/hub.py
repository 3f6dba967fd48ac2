"""Where a model lies: a path on this machine, or a repository of the Hugging Face hub, fetched into the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from engine.weights.safetensors import INDEX_NAME, SINGLE_NAME, shards_of

CONFIG_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "vocab*", "merges.txt", INDEX_NAME,
)  # fmt: skip
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?::((?:{_NAME}/)*{_NAME}\.gguf))?")


def locate(model: str, revision: str | None = None, *, weights: bool = True, setting: str = "model") -> Path:
    """-> the .gguf file or the folder that `model` names: a path, else ORG/NAME or ORG/NAME:FILE.gguf on the hub.

    Only what loading needs is fetched, once; a download that was cut short goes on where it ended. Without `weights`
    the tokenizer's and config's files suffice. Errors: ValueError that names the setting and what is wrong.
    """
    path = Path(model)
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision: is for models from the hub, but {model} is a path on this machine")
        return path
    match = _HUB_ID.fullmatch(model)
    if match is None:
        raise ValueError(
            f"{setting}: {model!r:.200} does not exist here, and is no hub id either: those read ORG/NAME, or "
            "ORG/NAME:FILE.gguf"
        )
    repository, file = match.groups()
    if file is not None:
        return _fetch(setting, repository, revision, [file]) / file
    folder = _fetch(setting, repository, revision, [*CONFIG_FILES], ignore=["*/*"])
    if weights:
        if not (folder / "config.json").is_file():
            hint = _gguf_hint(repository, revision)
            raise ValueError(f"{setting}: {repository} on the hub has no config.json; {hint}")
        index = folder / INDEX_NAME
        wanted = [shard.name for shard in shards_of(index)] if index.is_file() else [SINGLE_NAME]
        folder = _fetch(setting, repository, folder.name, wanted)  # the folder's name is the commit: one and the same
    return folder


def _fetch(
    setting: str, repository: str, revision: str | None, files: list[str], ignore: list[str] | None = None
) -> Path:
    """-> the snapshot's folder, with those of the files that the repository has. Errors: ValueError."""
    import huggingface_hub  # it takes a third of a second, and most models are paths

    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=files, ignore_patterns=ignore
        )
    except Exception as error:  # its own, its HTTP library's and the system's have no base in common
        raise ValueError(
            f"{setting}: {repository}{f' at revision {revision}' if revision else ''} is no path here and cannot be "
            f"had from the hub: {_reason(error)}"
        ) from error
    lacking = [file for file in files if ignore is None and not Path(folder, file).is_file()]
    if lacking:
        raise ValueError(f"{setting}: {repository} on the hub has no {', '.join(lacking[:5])}")
    return Path(folder)


def _reason(error: Exception) -> str:
    """-> the first sentence of what the hub's library says, and the remedy for what can be told."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access to it must be granted first; ask for it on its page, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository; if it is private, log in with `hf auth login`"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)):
        return "the hub cannot be reached, and it is not in the cache; check the network, or name a local path"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def _gguf_hint(repository: str, revision: str | None) -> str:
    """-> which of the repository's GGUF files to name, as far as the hub tells."""
    import huggingface_hub

    files: list[Any]
    try:
        files = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
    except Exception:  # only a hint depends on it
        files = []
    names = sorted(name for name in files if name.endswith(".gguf"))
    if not names:
        return "it holds no model that can be read here"
    return f"name one of its files, as {repository}:{names[0]} (of {len(names)}: {', '.join(names[:10])})"
