"""A chat with a running server, token by token, by the standard library alone.

    python -m engine.serve --model MODEL --port 8000
    python examples/streaming_client.py http://localhost:8000 "Why is the sky blue?"

The `openai` package does the same with `client.chat.completions.create(..., stream=True)`.
"""

from __future__ import annotations

import json
import sys
import urllib.request


def main(url: str, question: str) -> None:
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 64, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as stream:
        for line in stream:  # data: {...}, and an empty line after each
            data = line.removeprefix(b"data: ").strip()
            if data and data != b"[DONE]":
                print(json.loads(data)["choices"][0]["delta"].get("content") or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
