"""A server in a process group of its own: started on a free port, waited for, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_LISTENING = re.compile(r"listening on http://\S*?:(\d+)[,\s]")


# A killed parent can end nothing: so the kernel tells the server when its parent is gone (Linux, prctl(2)).
_WRAPPER = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[1], sys.argv[1:])"
)
_ENDS_WITH_US = [sys.executable, "-c", _WRAPPER] if sys.platform == "linux" else []


class StartFailed(Exception):
    """The server did not become ready; the message says why, in its own words."""


class ServerProcess:
    """A context that ends the server. Errors: StartFailed.

    `command` is `python -m engine.serve …` with `--port 0`; what it prints goes to the file `log`.
    """

    def __init__(self, command: Sequence[str], log: Path, timeout: float):
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*_ENDS_WITH_US, *command],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            self.port = self._wait(timeout)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait(self, timeout: float) -> int:
        """-> the port, when the model is loaded."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            text = self.log.read_text(errors="replace")
            found = _LISTENING.search(text)
            if found and "quire: ready" in text:
                return int(found[1])
            if self._process.poll() is not None:
                raise StartFailed(_reason(text) or f"it ended with status {self._process.returncode}")
            time.sleep(0.1)
        raise StartFailed(f"it was not ready after {timeout:g} s")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self, grace: float = 30.0) -> None:
        """End the process and its whole group, by force if it takes longer than `grace` seconds."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        with contextlib.suppress(ProcessLookupError):  # what it has left behind, and itself if it hangs
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _reason(log: str) -> str:
    """-> the line of the log that says why the server ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "the engine has failed: " in line or line.startswith(("FATAL", "error:"))]
    return (told or lines or [""])[-1].removeprefix("quire: the engine has failed: ")[:1000]
