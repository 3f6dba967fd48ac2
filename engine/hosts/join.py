"""Joining the processes of one engine: JAX's devices, then our connections, then whether all of them run the same."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engine.config import EngineConfig
from engine.executables import source_hash
from engine.hosts.follower import Follower
from engine.hosts.leader import END_SECONDS, Leader
from engine.hosts.wire import HostLost, parse_address, read_secret

OWN_SETTINGS = {
    "model",
    "tokenizer",
    "process_id",
    "control_address",
    "secret_file",
    "compilation_cache_dir",
}  # may differ by host
ENDS = 1 << 20  # bytes at either end of a checkpoint's files that its hash covers

Peers = Leader | Follower


@contextlib.contextmanager
def joined(config: EngineConfig, report: Callable[[str], None]) -> Iterator[Peers]:
    """Yields the connections to the other processes. An error inside ends them, too, and a follower at once, with one
    line: JAX would wait for the others. Errors: ValueError, HostLost, OSError.
    """
    peers = None
    try:
        peers = _join(config, report)
        yield peers
    except Exception as error:
        if config.process_id:
            _end(config.process_id, error, report)
        if isinstance(peers, Leader):
            peers.fail(HostLost(f"{type(error).__name__}: {error}"))
        raise


def _join(config: EngineConfig, report: Callable[[str], None]) -> Peers:
    assert config.control_address and config.secret_file and config.process_id is not None and config.num_processes
    address, secret = parse_address("control_address", config.control_address), read_secret(config.secret_file)
    if jax.distributed.is_initialized():
        raise ValueError("num_processes: this process has joined others before, and can do so only once")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    jax.distributed.initialize(
        config.coordinator_address, config.num_processes, config.process_id,
        cluster_detection_method="deactivate", shutdown_timeout_seconds=END_SECONDS,
    )  # fmt: skip
    if config.process_id == 0:
        leader = Leader(address, secret, config.num_processes - 1, report)
        atexit.register(leader.close)
        return leader
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # process 0 gets one, too, and lets us go when it is done
    return Follower(address, secret, config.process_id, lambda error: _end(config.process_id, error, report))


def _end(process_id: int | None, error: Exception, report: Callable[[str], None]) -> None:
    """End the process at once, whatever its threads wait for."""
    kind = "" if isinstance(error, HostLost) else f"{type(error).__name__}: "
    report(f"process {process_id} ends: {kind}{error!s:.1000}")
    sys.stdout.flush()
    os._exit(1)


def identity(config: EngineConfig, checkpoint: Path, together: bool) -> dict[str, str]:
    """-> what must be the same in every process: versions, sources, settings, the checkpoint's contents, and whether
    all make calls `together` or only process 0 does."""
    settings = {f.name: repr(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in OWN_SETTINGS}
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    sources = {"quire's sources": source_hash(), "the checkpoint": checkpoint_hash(checkpoint)}
    program = {"its program": "LLM, whose calls all make" if together else "one that process 0 alone is asked by"}
    return versions | {"python": sys.version.split()[0]} | sources | program | settings


def checkpoint_hash(path: Path) -> str:
    """-> a hash over names, sizes and both ends of the checkpoint's files: their headers, and some weights."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{'' if file == path else file.relative_to(path)} {size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(ENDS))
            opened.seek(max(size - ENDS, 0))
            digest.update(opened.read(ENDS))
    return digest.hexdigest()


def encode(name: str, arrays: tuple[Any, ...]) -> list[Any]:
    """-> one command to the devices as a message: its name and its numpy arrays."""
    each = [np.asarray(array) for array in arrays]
    return [name, [[array.dtype.str, list(array.shape), array.tobytes()] for array in each]]


def decode(message: Any) -> tuple[str, list[np.ndarray]]:
    """-> name and arrays. Errors: HostLost for anything but what `encode` makes."""
    try:
        name, arrays = message
        return str(name), [np.frombuffer(data, np.dtype(kind)).reshape(shape) for kind, shape, data in arrays]
    except (TypeError, ValueError, AttributeError) as error:
        raise HostLost(f"process 0 sent no command: {error}") from None


def follow(follower: Follower, execute: Callable[[str, list[np.ndarray]], Any]) -> dict[str, Any] | None:
    """Do what the leader does with its devices, until it says something else. -> that; None if it lets us go.

    Any error on the way ends the process.
    """
    try:
        while True:
            match follower.next():
                case {"prepare": command}:  # which may take each process its time
                    execute(*decode(command))
                    follower.agree(1)
                case dict() | None as other:
                    return other
                case command:
                    execute(*decode(command))
    except Exception as error:
        follower.fail(error)
        raise
