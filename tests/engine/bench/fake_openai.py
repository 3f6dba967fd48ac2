"""A server that speaks OpenAI's interface and answers after delays that the prompt names: the truth is known.

`python -m tests.engine.bench.fake_openai` serves on a free port, which it prints.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from typing import Any

MODELS = {"object": "list", "data": [{"id": "fake", "root": None}]}


def delays(prompt: list[int], count: int) -> list[float]:
    """-> seconds before each of the answer's tokens: the prompt's first two ids are milliseconds before the first and
    on average between the others, its third draws.
    """
    first, between, seed = prompt[:3]
    source = random.Random(seed)
    return [first / 1000] + [between / 1000 * source.uniform(0.5, 1.5) for _ in range(count - 1)]


class FakeOpenAI(asyncio.Protocol):
    """One connection. `seen` collects request bodies; `trouble` is how answers go wrong."""

    def __init__(self, seen: list[Any], trouble: str | None = None):
        self.seen, self.trouble = seen, trouble
        self.buffer = b""
        self.transport: Any = None
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        sizes = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        size = sizes[0] if sizes else 0
        if len(rest) < size:
            return
        self.buffer = rest[size:]
        method, path = head.split(b" ")[:2]
        if (method, path) == (b"GET", b"/v1/models"):
            self._answer(200, json.dumps(MODELS).encode())
        elif not path.endswith(b"/completions"):
            self._answer(404, b"")
        elif self.trouble == "status":
            self._answer(429, b'{"error": {"message": "queue full"}}')
        else:
            body = json.loads(rest[:size])
            self.seen.append(body)
            self.task = asyncio.get_running_loop().create_task(self._stream(body, path == b"/v1/chat/completions"))

    def _answer(self, status: int, body: bytes) -> None:
        self.transport.write(b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))

    def _event(self, value: Any) -> None:
        data = b"data: %b\n\n" % (value if isinstance(value, bytes) else json.dumps(value).encode())
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def _stream(self, body: dict[str, Any], chat: bool) -> None:
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        ids = [int(word) for word in prompt.split()] if isinstance(prompt, str) else prompt
        waits = delays(ids, body["max_completion_tokens"] if chat else body["max_tokens"])
        kind = b"content-type: text/event-stream\r\ntransfer-encoding: chunked"
        self.transport.write(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % kind)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for i, due in enumerate(itertools.accumulate(waits)):
            await asyncio.sleep(began + due - loop.time())  # what one sleep is late is not added to the next
            if self.trouble == "cut" and i == 2:
                self.transport.abort()
                return
            choice = {"index": 0, "delta": {"content": " a"}} if chat else {"index": 0, "text": " a"}
            self._event({"object": "chat.completion.chunk" if chat else "text_completion", "choices": [choice]})
        if self.trouble == "error":
            self._event({"error": {"message": "the engine has failed"}})
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(waits)}
        if body.get("stream_options", {}).get("include_usage"):
            self._event({"choices": [], "usage": usage})
        if self.trouble != "no end":
            self._event(b"[DONE]")
        self.transport.write(b"0\r\n\r\n")
        if self.trouble == "closes":
            self.transport.close()


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(lambda: FakeOpenAI([]), "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
