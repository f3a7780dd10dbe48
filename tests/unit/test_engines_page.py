"""docs/engines.md holds what was run."""

from __future__ import annotations

from tools.engines_page import PAGE, page


def test_the_tables_are_those_of_the_records() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run: python tools/engines_page.py"
