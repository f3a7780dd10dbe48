"""JSON of any shape: what is not what was asked for is nothing, and what breaks a rule is named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rm_scale import json_values
from rm_scale.json_values import MAX_DEPTH, Rule, as_number, as_whole, broken_rule, one_of, parse_json, whole

ODD: list[Any] = [None, True, "x", "1", [], {}, [1], 10**400, -(10**400), math.nan, math.inf]


@pytest.mark.parametrize("value", ODD)
def test_what_is_no_number_is_none(value: Any) -> None:
    assert as_number(value) is None and as_whole(value) is None


def test_numbers() -> None:
    assert as_number(3) == 3.0 and as_number(0.5) == 0.5
    assert as_whole(3.0) == 3 and as_whole(0.5) is None and as_whole(10**30) is None and as_whole(1e308) is None


@pytest.mark.parametrize("value", ODD)
def test_other_kinds_take_only_their_own(value: Any) -> None:
    assert json_values.as_text(value) == (value if isinstance(value, str) else None)
    assert json_values.as_list(value) == (value if isinstance(value, list) else [])
    assert json_values.as_mapping(value) == (value if isinstance(value, dict) else {})


def test_depth_has_an_end() -> None:
    def nested(depth: int) -> str:
        return "[" * depth + "]" * depth

    assert parse_json(nested(MAX_DEPTH)) and parse_json("[" + "[]," * 1000 + "[]]")
    for text in (nested(MAX_DEPTH + 1), nested(900), nested(100_000), '{"a":' * 500 + "1" + "}" * 500):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            parse_json(text)


@pytest.mark.parametrize(
    ("rule", "value", "words"),
    [
        (whole(1, 5000), 0, "a=0: must be a whole number from 1 to 5,000"),
        (whole(1, 5), True, "a=true: must be"),
        (one_of("x"), "y", "a=\"y\": must be 'x'"),
        (one_of("x", "z"), ["x"], "a=[\"x\"]: must be one of 'x', 'z'"),
        (json_values.TEXT.or_null(), 7, "a=7: must be a text, or null"),
        (json_values.NAME, "", 'a="": must be a name'),
        (json_values.NUMBER, json.loads("1e999"), "a=Infinity: must be a finite number"),
    ],
)
def test_a_broken_rule_is_named(rule: Rule, value: Any, words: str) -> None:
    assert (broken_rule({"b": 1, "a": value}, {"a": rule}) or "").startswith(words)
    assert broken_rule({}, {"a": rule}) is None
