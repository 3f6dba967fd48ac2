"""ServerOptions: every setting of the HTTP side and its default."""

from __future__ import annotations

from dataclasses import dataclass

from engine.server.tool_calls import PARSERS

MIB = 1 << 20


@dataclass(frozen=True)
class ServerOptions:
    """Settings of one server. Times are seconds, sizes bytes. Errors: ValueError that names the setting."""

    served_model_name: tuple[str, ...]  # the names that requests may give; the first one is in the answers
    host: str = "0.0.0.0"
    port: int = 8000  # 0 takes a free one
    api_key: tuple[str, ...] = ()  # any of them opens the door; none: no key is asked for
    max_queue: int = 1024  # completions that may wait beyond the engine's max_num_seqs
    max_queue_tokens: int = 1 << 22  # prompt tokens that may wait
    tool_call_parser: str | None = None  # how the model writes tool calls; none: they stay text
    shutdown_timeout: float = 20.0  # what running requests get after SIGTERM
    timeout_keep_alive: int = 5
    uvicorn_log_level: str = "info"
    max_connections: int = 4096

    max_body_bytes: int = 10 * MIB
    max_header_bytes: int = 32 << 10
    header_timeout: float = 10.0  # from the first byte of a request to the end of its headers
    body_timeout: float = 60.0
    write_timeout: float = 60.0  # for a client that reads nothing
    template_timeout: float = 10.0  # of rendering one chat template
    embedding_timeout: float = 60.0  # for which texts to embed wait until running requests have left pages
    stream_backlog: int = 1024  # updates that wait for a slow reader before its request is aborted
    death_grace: float = 1.0  # for which a dead engine's server still answers, with 503

    def __post_init__(self):
        if not self.served_model_name or not all(self.served_model_name):
            raise ValueError(f"served_model_name: give at least one name, got {self.served_model_name!r}")
        if not all(self.api_key):
            raise ValueError("api_key: a key must not be empty")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: must be in [0, 65535], got {self.port}")
        if self.tool_call_parser not in (None, *PARSERS):
            raise ValueError(f"tool_call_parser: must be one of {', '.join(PARSERS)}, got {self.tool_call_parser!r}")
        for name in ("max_queue", "shutdown_timeout", "timeout_keep_alive"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: must be at least 0, got {getattr(self, name)}")
        for name in ("max_queue_tokens", "max_connections"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
