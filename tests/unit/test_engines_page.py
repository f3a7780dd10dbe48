"""docs/engines.md holds what was run, and says what was not."""

from __future__ import annotations

import re

from tests.compat.vllm_parity import grid
from tools.engines_page import NAMES, PAGE, page, read_record


def test_the_tables_are_those_of_the_records() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run: python tools/engines_page.py"


def test_all_that_can_be_run_in_vllm_stands_there() -> None:
    expected = [row[:4] for row in grid({})]
    assert [row[:4] for row in read_record("vllm")["rows"]] == expected


def test_nothing_was_off() -> None:
    for name in NAMES:
        for row in read_record(name)["rows"]:
            assert "**off**" not in row, (name, row)


def test_the_tests_that_stand_for_trls_are_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}(" in (PAGE.parents[1] / "tests" / file).read_text(encoding="utf-8"), (file, name)
