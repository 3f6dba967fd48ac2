"""Quire: a JAX-first inference engine for language models. Importing this starts no JAX backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.request import RequestError, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM

__all__ = ["LLM", "RequestError", "RequestOutput", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":  # it brings JAX, which takes half a second: only those who use it wait
        from engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
