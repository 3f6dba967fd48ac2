"""`python -m tests.engine.server.fake_server OPTIONS`: the real server around a fake core. OPTIONS is JSON."""

from __future__ import annotations

import json
import sys
import time

from engine.server import ServerOptions, run
from tests.engine.server.fake_core import FakeCore


def main() -> int:
    options = json.loads(sys.argv[1])
    core_options = options.pop("core", {})
    load_seconds = options.pop("load_seconds", 0.0)
    template_seconds = options.pop("template_seconds", 0.0)
    load_error = options.pop("load_error", None)

    def load() -> FakeCore:
        time.sleep(load_seconds)
        if load_error is not None:
            raise ValueError(load_error)
        core = FakeCore(**core_options)
        if template_seconds:
            core.tokenizer.apply_chat_template = lambda *args, **kwargs: time.sleep(template_seconds)
        return core

    return run(load, ServerOptions(served_model_name=("fake",), host="127.0.0.1", **options))


if __name__ == "__main__":
    sys.exit(main())
