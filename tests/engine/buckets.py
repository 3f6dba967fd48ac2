"""Fewer step shapes than an engine makes for itself, for tests whose time goes into compiling them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from engine import compiler
from engine.step_input import StepShape


@contextmanager
def few_buckets() -> Iterator[None]:
    """Within it, an engine compiles one step for whatever there is to do, and one with all drafts, if it has any.

    Which bucket a plan gets is a matter of other tests.
    """
    without = lambda rows, tokens: [StepShape(rows, tokens)]

    def with_drafts(shapes: Sequence[StepShape], drafts: int, max_num_batched_tokens: int) -> list[StepShape]:
        (shape,) = shapes
        all_drafts = StepShape(shape.rows, shape.rows * (1 + drafts), drafts=drafts)
        assert all_drafts.tokens <= max_num_batched_tokens
        return [shape._replace(follows=True), all_drafts._replace(follows=True)]

    with patch.object(compiler, "step_shapes", without), patch.object(compiler, "speculative_shapes", with_drafts):
        yield
