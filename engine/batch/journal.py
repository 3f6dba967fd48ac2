"""The output file as a journal: what is in it is done, so that a batch goes on where it stopped, however it stopped."""

from __future__ import annotations

import fcntl
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

from engine.batch.rows import digest, read_row

MAX_LINE = 64 << 20  # bytes; a longer one is not believed to be a request


class Journal:
    """Appends rows to `path`, whole ones only. Holds 8 bytes a line of input, whatever the rows are.

    A row that a killed process left half written is cut off when the file is opened again; nothing else is changed.
    Errors: ValueError, if the file is not ours, or in use.
    """

    def __init__(self, path: Path):
        self.path = path
        self.ids = array("Q")  # digest of the custom_id of each line that is done, by number; 0: not done
        self.count = 0  # lines that are done
        self._file = open(path, "a+b")  # noqa: SIM115  it is open as long as this is
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.path}: another process is writing to it") from None

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for row, text in enumerate(iter(lambda: self._file.readline(MAX_LINE), b"")):
            if not text.endswith(b"\n"):
                break
            try:
                number, custom_id = read_row(text)
            except ValueError as error:  # msgspec's are, too
                raise ValueError(f"{self.path}:{row + 1}: not a row of a batch: {error}; name another file") from None
            end += len(text)
            self._mark(number, digest(custom_id))
        if end != self._file.seek(0, os.SEEK_END):
            self._file.truncate(end)

    def has(self, number: int) -> int:
        """-> the digest of the id under which a line was done, 0 if it wasn't."""
        return self.ids[number] if number < len(self.ids) else 0

    def append(self, number: int, key: int, row: bytes) -> None:
        """Write the row of a line, whose id has the digest `key`. It survives this process as soon as it is flushed."""
        self._file.write(row)
        self._mark(number, key)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Write everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _mark(self, number: int, key: int) -> None:
        if number >= len(self.ids):
            self.ids.extend([0] * (number + 1 - len(self.ids)))
        self.count += self.ids[number] == 0
        self.ids[number] = key


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields number and text of each line that is not blank. Errors: ValueError."""
    with path.open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(MAX_LINE), b"")):
            if len(text) >= MAX_LINE:
                raise ValueError(f"{path}:{number + 1}: a line of {MAX_LINE >> 20} MiB or more is no request")
            if text.strip():
                yield number, text


def count_lines(path: Path) -> int:
    """-> lines of a file, counted without keeping them."""
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")
