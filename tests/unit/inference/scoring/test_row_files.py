"""Rows to score: what is read of them, and the files that come of it."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError
from rm_scale.inference.scoring.row_files import Scorable, open_rows, output_suffix, scorable, write_rows

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, Scorable("a", "b")),
        ({"completion": "b"}, Scorable("", "b")),
        ({"prompt": "a", "completion": ""}, Scorable("a", "")),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, Scorable([SYSTEM, USER], [ANSWER])),
        ({"prompt": [USER], "completion": "4"}, Scorable([USER], "4")),
        ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, Scorable([USER], [ANSWER])),
        ({"messages": [USER, ANSWER]}, Scorable([USER], [ANSWER])),
        ({"messages": [USER, ANSWER], "tools": '[{"name": "f"}]'}, Scorable([USER], [ANSWER], [{"name": "f"}])),
        ({"prompt": "a", "completion": "b", "tools": []}, Scorable("a", "b")),
        ({"text": "a b</s>"}, Scorable(text="a b</s>")),
        # A table's columns are there for every row.
        ({"prompt": "a", "completion": "b", "text": None, "messages": None}, Scorable("a", "b")),
        ({"prompt": [{**USER, "name": None}], "completion": [ANSWER]}, Scorable([USER], [ANSWER])),
        ({"prompt": '[{"not a message"', "completion": "b"}, Scorable('[{"not a message"', "b")),
        ({"messages": json.dumps([USER, ANSWER])}, Scorable([USER], [ANSWER])),
        ({"prompt": "2 + 2?", "completion": [USER, ANSWER]}, Scorable([USER], [ANSWER])),
        ({"prompt": [USER], "completion": [USER, ANSWER]}, Scorable([USER], [ANSWER])),
        ({"completion": [USER, ANSWER]}, Scorable([], [USER, ANSWER])),
        ({"completion": [ANSWER]}, Scorable([], [ANSWER])),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": None}}, Scorable([USER], [ANSWER])),
        # A prompt that a table's completion repeats is read once, but for a word that may be there by chance.
        ({"prompt": "Is it far? ", "completion": "Is it far?\nNo."}, Scorable("Is it far? ", "No.")),
        ({"prompt": "Hello", "completion": "Hello! How are you?"}, Scorable("Hello", "Hello! How are you?")),
        # Several forms of the same, and context that is part of it.
        ({"conversations": [USER], "completion": [ANSWER]}, Scorable([USER], [ANSWER])),
        ({"conversations": json.dumps([USER]), "completion": "4"}, Scorable([USER], "4")),
        ({"prompt": [USER], "completion": [ANSWER], "messages": [USER, ANSWER]}, Scorable([USER], [ANSWER])),
        ({"prompt": "2 + 2?", "messages": [USER, ANSWER], "text": ""}, Scorable([USER], [ANSWER])),
        ({"prompt": "2 + 2?", "text": "<user>2 + 2?</user>4"}, Scorable(text="<user>2 + 2?</user>4")),
        ({"prompt": "2 + 2?", "completion": "4", "text": "<user>2 + 2?</user>4"}, Scorable("2 + 2?", "4")),
        ({"prompt": [SYSTEM, USER], "completion": "4", "system": "Be short."}, Scorable([SYSTEM, USER], "4")),
        ({"prompt": "a", "completion": "b", "prompt_id": "x", "images": [], "system": ""}, Scorable("a", "b")),
        ({"completion": [ANSWER], "tools": [{"name": "f"}]}, Scorable([], [ANSWER], [{"name": "f"}])),
    ],
)
def test_what_is_scored(row: dict[str, Any], expected: Scorable) -> None:
    assert scorable(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "missing_key: prompt and completion, or messages, or text; the row has prompt"),
        ({}, "missing_key: .* the row has no column"),
        (["a"], "wrong_type: the row is no object"),
        ({"prompt": 3, "completion": "b"}, "wrong_type: prompt is a number, neither text nor a list of messages"),
        ({"prompt": "a", "completion": 1.5}, "wrong_type: completion is a number, neither"),
        ({"messages": "text"}, "wrong_type: messages is text, not a list"),
        ({"messages": []}, "empty: messages has no messages"),
        ({"text": ["a"]}, "wrong_type: text is not text"),
        ({"prompt": ["a"], "completion": "b"}, r"wrong_type: prompt\[0\] is text, not a message"),
        ({"prompt": [ANSWER], "completion": [ANSWER]}, "bad_conversation: message 0 is assistant"),
        ({"prompt": [USER], "completion": [USER]}, "bad_conversation: message 1 is user"),
        ({"messages": [USER]}, "bad_conversation: the conversation ends with user, not assistant"),
        ({"messages": [USER, ANSWER, USER]}, "bad_conversation: the conversation ends with user, not assistant"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "bad_conversation: the conversation ends with user"),
        ({"completion": [ANSWER, USER]}, "bad_conversation: the conversation ends with user"),
        ({"prompt": "Other", "completion": [USER, ANSWER]}, "prompt_mismatch: the shared messages don't hold"),
        ({"messages": [USER, {"role": "assistant"}]}, "bad_conversation: .* neither content nor tool calls"),
        ({"messages": "[{'role': 'user', 'content': 'a'}]"}, "wrong_type: .* isn't JSON .* json.dumps"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1}}, "unread_context: chat_template_kwargs"),
        # Two forms of which one would be dropped.
        (
            {"messages": [USER], "completion": "b"},
            r"unread_context: messages holds .* Fix: .* --ignore_columns messages",
        ),
        ({"messages": [USER, ANSWER], "prompt": [USER], "completion": [{**ANSWER, "content": "5"}]}, "messages holds"),
        ({"prompt": [USER], "conversations": [SYSTEM, USER], "completion": "4"}, "unread_context: conversations holds"),
        ({"prompt": "a", "text": "b"}, "unread_context: prompt holds 'a', which is not read"),
        ({"prompt": "Be kind.", "messages": [USER, ANSWER]}, "unread_context: prompt holds 'Be kind.', which is not"),
        (
            {"prompt": "a", "completion": "b", "text": "c"},
            "unread_context: text holds 'c', which is not what is scored",
        ),
        ({"messages": [USER, ANSWER], "text": "c"}, "unread_context: text holds 'c'"),
        # What training refuses.
        ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, "unread_context: tools need messages"),
        ({"text": "a", "tools": [{"name": "f"}]}, "unread_context: tools holds"),
        ({"prompt": "a", "completion": "b", "system": "Be short."}, "system holds .* --ignore_columns system"),
        ({"prompt": [USER], "completion": "4", "images": ["a.png"]}, "unread_context: images holds"),
        ({"text": "a", "system": "b"}, "unread_context: system holds"),
        ({"prompt": "a", "completion": "\ud800"}, "bad_unicode: completion holds a lone surrogate"),
        ({"prompt": [{"role": "user", "content": "\udc00"}], "completion": "b"}, "bad_unicode: prompt"),
        ({"prompt": "a", "completion": "b", "tools": "{"}, "wrong_type: tools is text that isn.t JSON"),
        ({"prompt": "a", "completion": "b", "tools": {"a": 1}}, "wrong_type: tools is an object, not a list"),
        (RejectedRow("bad_json", "line"), "bad_json: line"),
    ],
)
def test_what_is_refused(row: Any, reason: str) -> None:
    with pytest.raises(RejectedRow, match=reason):
        scorable(row)


def test_columns_that_are_to_be_ignored_come_back_unread(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "system": "Be short.", "messages": [USER, ANSWER]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\nno row\n")
    with open_rows(str(path), ["system", "messages"]) as rows:
        (_, found), (_, broken) = rows.read(0, 2)
    for one in (found, pickle.loads(pickle.dumps(found))):
        assert one == row and scorable(one) == Scorable("a", "b")
    assert isinstance(broken, RejectedRow)
    with open_rows(str(path), ["completion"]) as rows, pytest.raises(RejectedRow, match="unread_context: prompt"):
        scorable(rows.read(0, 1)[0][1])


def test_what_a_policy_wrote_keeps_a_prompt_that_it_repeats() -> None:
    row = {"prompt": "Is it far? ", "completion": "Is it far? No."}
    assert scorable(row, cells=False).completion == row["completion"]


def test_requests_are_refused_without_advice_on_files() -> None:
    with pytest.raises(RejectedRow, match=r"messages holds .* Fix: give one form: .* and leave messages out"):
        scorable({"messages": [USER], "completion": "b"}, cells=False)


ROWS = [
    {"id": 1, "prompt": "a", "completion": 'b, "c"\nd', "score": 0.5, "error": None},
    {"id": 2, "prompt": [USER], "completion": [ANSWER], "score": None, "error": "over_long"},
]
PLAIN = [{"id": n, "prompt": f"ü {n}", "score": n / 3, "error": None if n else "x"} for n in range(5)]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.csv", "out.parquet"])
def test_rows_are_written_whole_and_read_again(tmp_path: Path, name: str) -> None:
    path = write_rows([PLAIN[:2], PLAIN[2:]], tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "nothing is left beside it"
    with open_rows(str(path)) as rows:
        assert len(rows) == 5
        found = [row for _, row in rows.read(0, 99)]
    if name.endswith(".csv"):
        expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in PLAIN]
        assert found == expected
    else:
        assert found == PLAIN


def test_conversations_survive_every_form(tmp_path: Path) -> None:
    with write_rows([ROWS], tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first["completion"] == ROWS[0]["completion"] and json.loads(second["prompt"]) == [USER]
    conversation = [ROWS[1]]
    table = pq.read_table(write_rows([conversation], tmp_path / "out.parquet"))
    assert table.to_pylist() == conversation
    with gzip.open(write_rows([ROWS], tmp_path / "out.jsonl.gz"), "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == ROWS


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    first = write_rows([ROWS], tmp_path / "a.jsonl.gz").read_bytes()
    assert write_rows([ROWS[:1], ROWS[1:]], tmp_path / "b.jsonl.gz").read_bytes() == first


def test_outputs_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"can't be written in this form\. Fix: a name ending in \.jsonl, "):
        output_suffix(tmp_path / "out.xlsx")
    with pytest.raises(DataError, match=r"there is no folder .*gone\. Fix: make it first"):
        output_suffix(tmp_path / "gone" / "out.csv")
    with pytest.raises(DataError, match=r"no common types for Parquet .* Fix: an output ending in \.jsonl"):
        write_rows([ROWS], tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == []


def test_what_a_policy_wrote_is_scored_with_a_nul_in_it_too() -> None:
    """Training refuses such a row, the sign of a broken file; a policy's text must have a reward."""
    assert scorable({"prompt": "a", "completion": "b\x00"}).completion == "b\x00"
    assert scorable({"messages": [USER, {"role": "assistant", "content": "\x00"}]}).completion[0]["content"] == "\x00"
