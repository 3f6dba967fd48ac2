"""ApiError: a refusal with its HTTP status, and its form in OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

RETRY_SOON = {"retry-after": "1"}  # a full queue moves within a second or so
RETRY_LATER = {"retry-after": "5"}  # loading, or going down


class ApiError(Exception):
    """What a client is told instead of an answer. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """-> {"error": {"message", "type", "param", "code"}} as JSON; also the data of an error event in a stream."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message[:2000],
                    "type": _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
                    "param": self.param,
                    "code": self.code,
                }
            }
        )


_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=RETRY_LATER)


def still_loading() -> ApiError:
    return ApiError(503, "the model is still loading", code="loading", headers=RETRY_LATER)


def host_lost() -> ApiError:
    return ApiError(503, "one of the engine's hosts is lost", code="host_lost", headers=RETRY_LATER)


def engine_failed() -> ApiError:
    return ApiError(500, "the engine has failed; the server's log says why", code="engine_failed")
