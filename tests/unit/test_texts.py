"""Errors in one line, and names that are near."""

from __future__ import annotations

import pytest

from rm_scale.texts import did_you_mean, first_line, one_line, typed_line


def test_one_line() -> None:
    assert one_line(" a\n\n  b\tc\r\n") == "a b c"
    assert one_line(OSError("disk\nfull")) == "disk full"
    assert one_line("abc", 3) == "abc"
    assert one_line("abcd", 3) == "abc..."
    assert one_line(ValueError()) == ""


def test_first_line() -> None:
    assert first_line(ValueError("\n the first \r\nthe second")) == "the first"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError(" \n ")) == "ValueError"


def test_typed_line() -> None:
    assert typed_line(OSError("disk\nfull")) == "OSError: disk full"
    assert typed_line(OSError("disk full"), 4) == "OSError: disk..."
    assert typed_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("name", "most", "expected"),
    [
        ("stepp", 1, "did you mean step?"),
        ("stepp", 2, "did you mean step or steps?"),
        ("elephant", 2, "see the list."),
        ("", 1, "see the list."),
    ],
)
def test_did_you_mean(name: str, most: int, expected: str) -> None:
    assert did_you_mean(name, iter(["loss", "steps", "step"]), "see the list.", most) == expected


def test_likeness_is_what_a_name_must_reach() -> None:
    assert did_you_mean("14b", ["1b", "3b"], "no", likeness=0.5) == "did you mean 1b?"
    assert did_you_mean("14b", ["1b", "3b"], "no", likeness=0.9) == "no"
