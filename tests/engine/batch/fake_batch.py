"""`python -m tests.engine.batch.fake_batch IN OUT [STEP_SECONDS]`: a batch with a fake model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from engine.batch.journal import Journal
from engine.batch.run import Batch
from engine.request import Group
from tests.engine.server.fake_core import FakeCore


class ForgetfulCore(FakeCore):
    """Keeps nothing of what has been, as the real one."""

    def prepare(self, *arguments: Any, **options: Any) -> Group:
        self.prepared.clear()
        return super().prepare(*arguments, **options)

    def add(self, group: Group) -> None:
        self.added.clear()
        super().add(group)


def main(source: str, target: str, step_seconds: str = "0") -> None:
    core: Any = ForgetfulCore(max_num_seqs=64, step_seconds=float(step_seconds))
    journal = Journal(Path(target))
    Batch(core, journal, model="fake").run(Path(source))
    journal.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
