"""Rows to the completions of each prompt: both layouts, what must follow what, and reasons."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError
from rm_scale.inference.ranking.candidates import CandidateGroup, Columns, InputReport, read_groups


def read(rows: list[Any], **columns: Any) -> tuple[list[CandidateGroup], InputReport]:
    report = InputReport()
    return list(read_groups(enumerate(rows), Columns(**columns), report)), report


def test_lists_and_single_rows_give_the_same_groups() -> None:
    listed, _ = read(
        [{"prompt": "a", "completions": ["1", "2"], "id": 7}, {"prompt": "b", "responses": ["3"], "id": 8}]
    )
    single, _ = read(
        [
            {"prompt": "a", "completion": "1", "id": 7},
            {"prompt": "a", "completion": "2", "id": 7},
            {"prompt": "b", "response": "3", "id": 8},
        ]
    )
    for found in (listed, single):
        assert [(g.prompt, g.completions, g.columns) for g in found] == [
            ("a", ("1", "2"), {"id": 7}),
            ("b", ("3",), {"id": 8}),
        ]
    assert [g.rows for g in listed] == [(0, 0), (1, 1)]
    assert [g.rows for g in single] == [(0, 1), (2, 2)]


def test_a_prompt_that_comes_again_is_an_error_that_names_both_rows() -> None:
    rows = [{"prompt": p, "completion": "x"} for p in ("a", "a", "b", "a")]
    with pytest.raises(DataError, match=r"row 3: its prompt was in row 1 already.*--group_by COLUMN"):
        read(rows)
    asked: dict[str, Any] = {"prompt": [USER], "completion": "x"}
    tools = [asked, {**asked, "tools": [{"type": "function"}]}]
    assert len(read(tools)[0]) == 2


def test_group_by_collects_rows_wherever_they_stand() -> None:
    rows = [{"prompt": p, "completion": c, "q": p} for p, c in (("a", "1"), ("b", "2"), ("a", "3"))]
    groups, _ = read(rows, group_by="q")
    assert [(g.prompt, g.completions, g.rows, g.columns["q"]) for g in groups] == [
        ("a", ("1", "3"), (0, 2), "a"),
        ("b", ("2",), (1, 1), "b"),
    ]
    rows[2]["q"] = "b"
    with pytest.raises(DataError, match=r"--group_by q: rows 1 and 2 have the same value there, but different prompts"):
        read(rows, group_by="q")


def test_columns_follow_their_completion_or_are_named() -> None:
    rows = [
        {"prompt": "a", "completion": "1", "model": "m", "temperature": 0.1, "id": 1},
        {"prompt": "a", "completion": "2", "model": "n", "temperature": 0.9, "id": 1},
    ]
    groups, report = read(rows, per_completion=("model",))
    assert groups[0].per_completion == {"model": ("m", "n")}
    assert groups[0].columns == {"temperature": None, "id": 1}
    assert report.differing_columns == {"temperature"}
    listed, _ = read([{"prompt": "a", "completions": ["1", "2"], "model": ["m", "n"]}], per_completion=("model",))
    assert listed[0].per_completion == {"model": ("m", "n")}
    assert listed[0].columns == {}


def test_given_scores_are_numbers_or_reasons() -> None:
    row = {"prompt": "a", "completions": list("123456"), "score": [1, "2.5", None, "x", float("nan"), True]}
    (group,), _ = read([row], score_column="score")
    assert group.scores == (1.0, 2.5, None, None, None, None)
    assert group.problems == (None, None, "missing_key", "wrong_type", "wrong_type", "wrong_type")
    assert group.per_completion == {}


def test_completions_that_cannot_be_scored_keep_their_place() -> None:
    row = {"prompt": "a", "completions": ["ok", None, 3, "\ud800", "nul\x00", {"role": "assistant"}]}
    (group,), report = read([row])
    assert group.completions == ("ok", None, None, None, "nul\x00", None)
    assert group.problems == (None, "missing_key", "wrong_type", "bad_unicode", None, "bad_conversation")
    assert report.refused == {}


USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "ho"}


def test_conversations_become_one_kind_and_are_checked() -> None:
    (group,), _ = read([{"prompt": [USER], "completions": ["ho", [SAID], [USER], [SAID, USER], [{"role": "x"}], []]}])
    assert group.completions[:2] == ([SAID], [SAID])
    assert group.problems == (None, None, *["bad_conversation"] * 3, "empty")
    (mixed,), _ = read([{"prompt": "hi", "completions": ["ho", [SAID]]}])
    assert mixed.prompt == [USER]
    assert mixed.completions == ([SAID], [SAID])
    (odd,), _ = read([{"prompt": [USER], "completions": [[{"role": "assistant"}], [{**SAID, "name": None}]]}])
    assert odd.problems == ("bad_conversation", None)
    assert odd.completions[1] == [SAID]
    (cell,), _ = read([{"prompt": json.dumps([USER]), "completion": json.dumps([SAID])}])
    assert (cell.prompt, cell.completions) == ([USER], ([SAID],))


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"system": "Be short."}, "system holds 'Be short.', which is not read. Fix: .* --ignore_columns system"),
        ({"tools": [{"name": "f"}]}, "tools holds"),
        ({"images": ["a.png"]}, "images holds"),
        ({"messages": [{"role": "user", "content": "other"}]}, "messages holds"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs holds"),
        ({"conversations": [USER]}, "conversations holds"),
        ({"response": "other"}, "hold different completions"),
    ],
)
def test_context_that_is_not_read_is_refused_by_name(others: dict[str, Any], told: str) -> None:
    for row in ({"prompt": "a", "completions": ["x", "y"]}, {"prompt": "a", "completion": "x"}):
        groups, report = read([{**row, **others}])
        assert (groups, report.refused) == ([], {"unread_context": 1})
        assert re.search(told, report.examples["unread_context"][0][1])
        (name,) = others
        ((group,), _) = read([{**row, **others}], ignore_columns=(name,))
        assert group.prompt == "a" and group.tools is None and group.completions[0] == "x"
        assert name in ("tools", "response") or group.columns == others, "carried along"


def test_a_prompt_that_completions_repeat_is_read_once() -> None:
    asked = "Is it far? "
    for said, read_as in (
        ([f"{asked}No.", None, "Is it far?\nYes."], ("No.", None, "Yes.")),
        (["No.", "Yes."], ("No.", "Yes.")),
        ([f"{asked}No.", "Yes."], None),
    ):
        singles = [{"prompt": asked, "completion": one} for one in said]
        for rows in ([{"prompt": asked, "completions": said}], singles):
            groups, report = read(rows)
            assert [group.completions for group in groups] == ([] if read_as is None else [read_as])
            assert report.refused == ({"prompt_mismatch": len(rows)} if read_as is None else {})


def test_columns_whose_meaning_is_given_are_no_context() -> None:
    row = {"prompt": "a", "completions": ["x", "y"], "question": ["p", "q"], "response": "x"}
    ((group,), _) = read([row], per_completion=("question",))
    assert group.per_completion == {"question": ("p", "q")}
    ((group,), _) = read([{"conversations": [USER], "completions": ["x", "y"]}])
    assert group.prompt == [USER]


def test_rows_that_cannot_be_used_are_counted() -> None:
    good = {"prompt": "a", "completions": ["x"]}
    rows: list[Any] = [
        good,
        RejectedRow("bad_json", "broken"),
        17,
        {"prompt": "a"},
        {"prompt": None, "completions": ["x"]},
        {"prompt": " ", "completions": ["x"]},
        {"prompt": "a", "completions": "x"},
        {"prompt": "a", "completions": []},
        {**good, "tools": "{"},
        {**good, "tools": 3},
        {"prompt": 5, "completions": ["x"]},
    ]
    groups, report = read(rows)
    assert len(groups) == 1
    assert report.num_rows == len(rows)
    assert report.refused == {"bad_json": 1, "wrong_type": 5, "missing_key": 2, "empty": 2}
    assert report.examples["bad_json"] == [(1, "broken")]
    groups, report = read([{**good, "m": [1, 2]}, {**good, "m": ["q"]}, {**good, "m": None}], per_completion=("m",))
    assert [g.per_completion["m"] for g in groups] == [("q",)]
    assert report.examples["bad_label"][0] == (0, "m holds 2 values for 1 completions")


def test_both_layouts_in_one_file_are_counted_not_mixed() -> None:
    listed, single = {"prompt": "a", "completions": ["x"]}, {"prompt": "b", "completion": "y"}
    groups, report = read([single, listed, single])
    assert [g.completions for g in groups] == [("y", "y")]
    assert report.examples["missing_key"][0][0] == 1
    groups, report = read([listed, single])
    assert len(groups) == 1 and report.refused == {"missing_key": 1}
    groups, report = read([{**single, "q": 1}, {**single, "q": None}], group_by="q")
    assert len(groups) == 1 and report.refused == {"missing_key": 1}


def test_unknown_columns_are_refused() -> None:
    row = {"prompt": "a", "completion": "x"}
    with pytest.raises(DataError, match="row 0 has the columns prompt, text: none of them holds completions"):
        read([{"prompt": "a", "text": "x"}])
    for columns in ({"group_by": "q"}, {"per_completion": ("q",)}, {"score_column": "q"}):
        with pytest.raises(DataError, match=r"--\w+ q: row 0 has no such column, but prompt, completion\. Fix"):
            read([row], **columns)
    with pytest.raises(DataError, match="--group_by prompt: row 0 holds all completions of its prompt in a list"):
        read([{"prompt": "a", "completions": ["x"]}], group_by="prompt")
    assert read([])[0] == []


def test_memory_does_not_grow_with_the_texts() -> None:
    """20 MB of texts, of which one prompt's is held at a time; of the others a digest."""

    def rows() -> Iterator[tuple[int, Any]]:
        for index in range(4000):
            yield index, {"prompt": f"prompt {index // 4}", "completion": f"{index} " + "x" * 5000}

    tracemalloc.start()
    count = sum(len(group.completions) for group in read_groups(rows(), Columns(), InputReport()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert peak < 1_000_000
