"""Fewer step shapes than an engine makes for itself, for tests whose time goes into compiling them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from engine import compiler
from engine.step_input import StepShape


@contextmanager
def few_buckets(*, decodes: bool = False) -> Iterator[None]:
    """Within it, an engine compiles one step for whatever there is to do, and one with all drafts, if it has any.

    `decodes`: and one for decodes alone. Which bucket a plan gets is a matter of other tests.
    """
    without = lambda rows, tokens: [StepShape(rows, rows)] * decodes + [StepShape(rows, tokens)]

    def with_drafts(shapes: Sequence[StepShape], drafts: int, max_num_batched_tokens: int) -> list[StepShape]:
        rows = shapes[0].rows
        all_drafts = StepShape(rows, rows * (1 + drafts), drafts=drafts)
        assert all_drafts.tokens <= max_num_batched_tokens
        return [shape._replace(follows=True) for shape in (*shapes, all_drafts)]

    with patch.object(compiler, "step_shapes", without), patch.object(compiler, "speculative_shapes", with_drafts):
        yield
