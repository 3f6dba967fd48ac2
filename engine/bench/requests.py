"""One timed request to an OpenAI-compatible server: its body, and what its stream of events tells."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.bench.client import HttpClient
from engine.bench.datasets import Sample

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass
class Result:
    """What was seen of one request. Times are seconds; `start` is the event loop's clock."""

    prompt_len: int = 0
    output_len: int = 0
    start: float = 0.0
    ttft: float = 0.0  # from sending to the first token
    latency: float = 0.0  # from sending to the last token
    itl: list[float] = field(default_factory=list)  # between the events that brought text
    text: str = ""
    error: str = ""  # empty: it succeeded

    @property
    def tpot(self) -> float | None:
        """-> seconds for each output token after the first; None where there is one token only."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class StreamReader:
    """Takes the pieces of one stream of server-sent events and keeps the times at which tokens came."""

    def __init__(self, clock: Any):
        self.clock = clock
        self.times: list[float] = []
        self.texts: list[str] = []
        self.usage: _Usage | None = None
        self.error = ""
        self.ended = False  # [DONE] has come
        self._left = b""

    def feed(self, data: bytes) -> None:
        now = self.clock()
        *lines, self._left = (self._left + data).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.ended = True
                continue
            try:
                event = _decode(payload)
            except msgspec.MsgspecError as error:
                self.error = self.error or f"an event is not what it should be: {error}"
                continue
            if event.error is not None:
                self.error = str(event.error)[:500]
            self.usage = event.usage or self.usage
            for choice in event.choices:
                text = choice.text if choice.delta is None else choice.delta.content or choice.delta.reasoning_content
                if text or (text == "" and choice.delta is None):  # a chat begins with a role and no text
                    self.times.append(now)
                    self.texts.append(text)


def body_of(sample: Sample, model: str, backend: str, extra: Mapping[str, Any], ignore_eos: bool) -> bytes:
    """-> the request's JSON, streamed and with usage. `extra` goes over what is there."""
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if backend == "openai-chat":
        body |= {"messages": [{"role": "user", "content": sample.prompt}], "max_completion_tokens": sample.output_len}
    else:
        body |= {"prompt": sample.prompt, "max_tokens": sample.output_len}
    if ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode(body | dict(extra))


async def send(client: HttpClient, path: str, body: bytes, timeout: float) -> Result:
    """-> what came of it; failures are in `error`, nothing is raised but cancellation."""
    clock = asyncio.get_running_loop().time
    reader, result = StreamReader(clock), Result(start=clock())
    plain: list[bytes] = []  # the answer as it came, for what is not a stream

    def take(data: bytes) -> None:
        if not reader.times and len(plain) < 16:
            plain.append(data)
        reader.feed(data)

    try:
        async with asyncio.timeout(timeout):
            status = await client.request("POST", path, body, take)
    except TimeoutError:
        result.error = f"no answer within {timeout:g} s"
        return result
    except OSError as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    if status != 200:
        result.error = f"HTTP {status}: {b''.join(plain).decode(errors='replace')[:500]}"
    elif reader.error or not reader.times:
        result.error = reader.error or "the answer had no tokens"
    elif not reader.ended:
        result.error = "the stream ended without [DONE]"
    if result.error:
        return result
    result.ttft, result.latency = reader.times[0] - result.start, reader.times[-1] - result.start
    result.itl = [b - a for a, b in zip(reader.times, reader.times[1:], strict=False)]
    result.text = "".join(reader.texts)
    usage = reader.usage or _Usage()
    result.prompt_len = usage.prompt_tokens
    # A server that reports no usage sends a token in each event, as far as anybody can tell.
    result.output_len = len(reader.times) if usage.completion_tokens is None else usage.completion_tokens
    return result
