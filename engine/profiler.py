"""Traces of what the device and the host do, written by JAX's profiler for xprof and Perfetto."""

from __future__ import annotations

import jax

from engine.request import RequestError


class Profiler:
    """One trace at a time, into `folder`; None: traces are refused, since they write files and slow the engine."""

    def __init__(self, folder: str | None):
        self.folder = folder
        self.running = False

    def start(self) -> None:
        """Errors: RequestError."""
        if self.folder is None:
            raise RequestError("profile_dir", "is not set: start the engine with --profile-dir FOLDER")
        if self.running:
            raise RequestError("start_profile", "a trace is being made; stop it first")
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
        self.running = True

    def stop(self) -> None:
        """Write the trace. Errors: RequestError."""
        if not self.running:
            raise RequestError("stop_profile", "no trace is being made; start one first")
        self.running = False
        jax.profiler.stop_trace()
