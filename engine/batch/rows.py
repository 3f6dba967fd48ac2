"""Lines of a batch file: what they ask for, and the rows that answer them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.server.errors import ApiError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@dataclass(frozen=True)
class Line:
    """One line of the input that is a request."""

    number: int  # from 0
    custom_id: str
    url: str
    body: bytes  # JSON


class BadLine(Exception):
    """A line that is no request. `custom_id` is None where there is none to be had."""

    def __init__(self, custom_id: str | None, message: str):
        super().__init__(message)
        self.custom_id = custom_id


class _Form(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Id(msgspec.Struct):
    custom_id: Any = None


_decode, _decode_id = msgspec.json.Decoder(_Form).decode, msgspec.json.Decoder(_Id).decode


def parse(number: int, text: bytes) -> Line:
    """-> the request on a line. Errors: BadLine."""
    try:
        form = _decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadLine(_custom_id(text), f"line {number + 1}: {error}") from None
    if form.method != "POST":
        raise BadLine(form.custom_id, f"line {number + 1}: method: must be POST, got {form.method!r:.80}")
    if form.url not in URLS:
        raise BadLine(form.custom_id, f"line {number + 1}: url: must be one of {', '.join(URLS)}, got {form.url!r:.80}")
    return Line(number, form.custom_id, form.url, bytes(form.body))


def _custom_id(text: bytes) -> str | None:
    """-> the id of a line that is wrong in some other way."""
    try:
        found = _decode_id(text).custom_id
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def row_of_answer(line: Line, body: bytes) -> bytes:
    """-> the output row, with its newline, of a request that was answered."""
    return _row(line.number, line.custom_id, 200, body, None)


def row_of_error(number: int, custom_id: str | None, error: ApiError) -> bytes:
    """-> the output row, with its newline, of a line that failed."""
    return _row(number, custom_id, error.status, error.body(), {"code": error.code, "message": error.message[:2000]})


def _row(number: int, custom_id: str | None, status: int, body: bytes, error: Any) -> bytes:
    row_id = f"batch_req_{number}"
    response = {"status_code": status, "request_id": row_id, "body": msgspec.Raw(body)}
    row = {"id": row_id, "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(row) + b"\n"


class _Row(msgspec.Struct):
    id: str
    custom_id: str | None = None


_decode_row = msgspec.json.Decoder(_Row).decode


def read_row(text: bytes) -> tuple[int, str | None]:
    """-> number of the line that an output row answers, and its custom_id. Errors: ValueError."""
    row = _decode_row(text)
    prefix, _, number = row.id.rpartition("_")
    if prefix != "batch_req" or not (number.isascii() and number.isdigit()):
        raise ValueError(f"id: must be batch_req_ and a line's number, got {row.id!r:.80}")
    return int(number), row.custom_id


def digest(custom_id: str | None) -> int:
    """-> 64 bits that tell one id from another, never 0."""
    data = b"none" if custom_id is None else b"=" + custom_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) or 1
