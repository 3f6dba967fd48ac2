"""Compiled steps on disk, found again without tracing them: a warm start is spared the work in Python, too.

JAX's own cache knows an executable by its lowered program, which takes longer to make than the executable to read. This
one knows it by all that the program is made from: our sources, the versions below them, the device and the arguments.
Where a user has set up JAX's, it alone is used: what came out of it cannot be written down a second time.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

PACKAGES = ("engine", "kernels", "sharding")
JAX_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # what a compiler reads there, and nobody can ask it for
KEPT = 32  # identities in one root; those that were not used for longest go


class ExecutableCache:
    """Executables and small facts about them, in a folder of their own under `root`; None keeps nothing.

    `identity` is whatever they depend on beside sources, versions, device and compiler settings; parts by their repr.
    A file that is another user's, damaged or of an unknown kind counts as absent.
    """

    def __init__(self, root: Path | None, device: Any, *identity: Any):
        settings = [(name, getattr(jax.config, name)) for name in JAX_SETTINGS]
        environment = [(name, os.environ.get(name)) for name in ENVIRONMENT]
        parts = (source_hash(), jax.__version__, version("jaxlib"), _device(device), settings, environment, *identity)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        self.folder = None if root is None else root / f"steps-{key}"
        self._new: dict[str, Any] = {}  # compiled, not saved yet

    def get(self, name: str, compile: Callable[[], Any]) -> Any:
        """-> the executable that was kept under this name, or else a new one, which `save_new` will keep."""
        data = self._read(name)
        if data is not None:
            try:
                return serialize_executable.deserialize_and_load(*pickle.loads(data))
            except Exception:  # damaged, or of another build after all: whatever it is, compiling anew is the remedy
                pass
        executable = compile()
        self._new[name] = executable
        return executable

    def save_new(self) -> None:
        """Keep what was compiled, as far as its backend can write it down: for a thread, after all is compiled.

        Writing one down holds Python's lock for a fifth of a second, for which others could not trace.
        """
        for name, executable in self._new.items():
            if self.folder is not None:
                with suppress(ValueError, TypeError, jax.errors.JaxRuntimeError):
                    self._write(name, pickle.dumps(serialize_executable.serialize(executable)))
        self._new.clear()

    def get_number(self, name: str, compute: Callable[[], int]) -> int:
        """-> the number that was kept under this name, or else a new one, which is kept."""
        try:
            return int((self._read(name) or b"").decode())
        except ValueError:
            value = compute()
            self._write(name, str(value).encode())
            return value

    def _read(self, name: str) -> bytes | None:
        """-> a file's contents. An executable is code: what another user could have put there is not read."""
        if self.folder is None:
            return None
        try:
            with (self.folder / name).open("rb") as file:
                if os.fstat(file.fileno()).st_uid != os.getuid():
                    return None
                os.utime(self.folder)
                return file.read()
        except OSError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all."""
        if self.folder is None:
            return
        try:
            if not self.folder.exists():
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _drop_oldest(self.folder.parent)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(data)
            os.replace(file.name, self.folder / name)
        except OSError:  # a cache that cannot be written is only slow
            return


def _drop_oldest(root: Path) -> None:
    folders = sorted(root.glob("steps-*"), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def source_hash() -> str:
    """-> a hash of every file that a step is traced from."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in _source_files(root):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _source_files(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted(path for kind in ("*.py", "*.json") for path in (root / package).rglob(kind))


def _device(device: Any) -> tuple[Any, ...]:
    """-> the kind of device and the build of its compiler; on a CPU also which instructions it has."""
    kind = (device.platform, device.device_kind, device.client.platform_version, device.id, jax.device_count())
    if device.platform != "cpu":
        return kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = {line for line in lines if line.startswith(("flags", "Features"))}
    return (*kind, platform.machine(), platform.processor(), *sorted(flags))
