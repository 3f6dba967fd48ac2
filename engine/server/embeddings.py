"""/v1/embeddings: from its request to token ids, and from vectors to its JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from engine.request import RequestError
from engine.server.prompts import encode
from engine.server.protocol import EmbeddingRequest

if TYPE_CHECKING:
    from engine.replicas import Engine


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str  # or base64 of little-endian float32
    object: str = "embedding"


class Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    model: str
    data: list[Embedding]
    usage: Usage
    object: str = "list"


def prepare(core: Engine, request: EmbeddingRequest) -> list[list[int]]:
    """-> token ids of each text. Slow (it tokenizes), thread-safe. Errors: RequestError."""
    add_special_tokens = request.add_special_tokens is not False
    prompts = []
    try:
        for text in request.inputs():
            ids = encode(core, text, add_special_tokens=add_special_tokens) if isinstance(text, str) else text
            prompts.append(core.read_embedding_prompt(ids))
    except RequestError as error:
        raise RequestError("input", str(error).removeprefix("prompt: ")) from None
    return prompts


def portions(prompts: Sequence[list[int]], most: int) -> Iterator[Sequence[list[int]]]:
    """Yields the prompts in parts of up to `most` tokens, or one prompt, so that generation gets its turns between."""
    start = tokens = 0
    for end, prompt in enumerate(prompts):
        if end > start and tokens + len(prompt) > most:
            yield prompts[start:end]
            start, tokens = end, 0
        tokens += len(prompt)
    yield prompts[start:]


def answer(request: EmbeddingRequest, model: str, vectors: Sequence[np.ndarray], prompt_tokens: int) -> Embeddings:
    """vectors, each [hidden] float32 -> the answer."""
    if request.encoding_format == "base64":
        values = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    else:
        values = [vector.tolist() for vector in vectors]
    data = [Embedding(i, value) for i, value in enumerate(values)]
    return Embeddings(model, data, Usage(prompt_tokens, prompt_tokens))
