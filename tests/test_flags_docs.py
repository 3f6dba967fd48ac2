"""docs/flags.md is what the flags say."""

from __future__ import annotations

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def test_the_page_of_flags_is_current():
    spec = importlib.util.spec_from_file_location("make_flags_docs", ROOT / "scripts" / "make_flags_docs.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run: python scripts/make_flags_docs.py"
