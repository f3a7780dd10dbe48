"""What a column map can say, one case of the language at a time, and what is refused in a row."""

from __future__ import annotations

from typing import Any

import pytest

from rm_scale.data.column_maps.column_map import ColumnMap
from rm_scale.data.column_maps.places import read_place
from rm_scale.data.formats import RowReader
from rm_scale.data.rejected_rows import RejectedRow

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("place", "row", "value"),
    [
        ("meta.question", {"meta": {"question": "2 + 2?"}}, "2 + 2?"),
        ("answers[-1].text", {"answers": [{"text": "4"}, {"text": "5"}]}, "5"),
        ("answers[*].text", {"answers": [{"text": "4"}, {"text": "5"}]}, ["4", "5"]),
        ("answers[*].votes[0]", {"answers": [{"votes": [3]}, {"votes": [1]}]}, [3, 1]),
        ("a.b", {"a.b": "a name with a dot", "a": {"b": "no"}}, "a name with a dot"),
        ("answers[0].text", {"answers": '[{"text": "4"}]'}, "4"),  # JSON text in a table
        ("chosen-rating", {"chosen-rating": 4.5}, 4.5),
        ("1", {"1": "one"}, "one"),
        ("gone?", {}, None),
        ("a[0]?", {"a": None}, None),
        ({"constant": 3}, {}, 3),
        ({"first_of": ["a", "b", "c"]}, {"a": "", "b": None, "c": "text"}, "text"),
        ({"template": "{a}\n{b.c} {{d}}"}, {"a": "x", "b": {"c": 2}}, "x\n2 {d}"),
        ({"template": "{a}{b?}"}, {"a": "x"}, "x"),
        ({"join": ["a", "b", "c"], "with": "\n"}, {"a": "x", "b": float("nan"), "c": "z"}, "x\nz"),
        ({"join": ["a", "b"]}, {"a": ["x", "y"], "b": ""}, "x\ny"),
        ({"mean": "r"}, {"r": [1, 2, None, 6]}, 3.0),
        ({"mean": ["r1", "r2"]}, {"r1": 1, "r2": "2"}, 1.5),
        ({"mean": "answers[*].ratings"}, {"answers": [{"ratings": [1, 2]}, {"ratings": [5]}]}, [1.5, 5.0]),
        ({"difference": ["a", "b"]}, {"a": 3, "b": "1.5"}, 1.5),
    ],
)
def test_the_value_of_a_place(place: Any, row: dict[str, Any], value: Any) -> None:
    assert read_place(row, place) == value


@pytest.mark.parametrize(
    ("place", "row", "reason", "detail"),
    [
        ("meta.question", {"meta": {"answer": 1}}, "missing_key", "meta.question"),
        ("answers[2]", {"answers": [1]}, "missing_key", r"answers\[2\]"),
        ("answers[*].text", {"answers": "no list"}, "wrong_type", r"answers\[\*\].text: \[\*\] stands at text"),
        ("a[0]", {"a": "hello"}, "wrong_type", r"a\[0\]: \[0\] stands at text, not a list"),
        ("a[-1].text", {"a": {"text": "x"}}, "wrong_type", r"a\[-1\].text: \[-1\] stands at an object, not a list"),
        ("a[*].b[1]", {"a": [{"b": "hello"}]}, "wrong_type", r"\[1\] stands at text, not a list"),
        ("a[0]", {"a": None}, "missing_key", r"a\[0\]"),
        ({"first_of": ["a", "b"]}, {"a": ""}, "missing_key", "a or b"),
        ({"template": "{a} {b}"}, {"a": "x", "b": None}, "missing_key", "b"),
        ({"template": "{a}"}, {"a": {"b": 1}}, "wrong_type", "a is an object, not text"),
        ({"join": ["a", "b"]}, {"a": ""}, "missing_key", "a or b"),
        ({"mean": "r"}, {"r": ["x"]}, "wrong_type", "r holds text, not a number"),
        ({"mean": "r"}, {"r": []}, "bad_label", "r is a list, not a list of ratings"),
        ({"difference": ["a", "b"]}, {"a": 3, "b": None}, "bad_label", "holds null"),
    ],
)
def test_a_row_without_the_value(place: Any, row: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(RejectedRow, match=f"{reason}: .*{detail}"):
        read_place(row, place)


def read(columns: dict[str, Any], row: dict[str, Any], format: str = "soft_label", **options: Any) -> Any:
    return RowReader(format, column_map=ColumnMap(columns), **options).read(row, 0)


TWO = {"prompt": "q", "responses": ["a", "b"]}
TEXTS = {"q": "2 + 2? ", "a": "4", "b": "5"}


@pytest.mark.parametrize(
    ("label", "values", "ranks", "soft", "margin"),
    [
        ({"better": {"path": "l", "first": ["A"], "second": ["B"]}}, {"l": "B"}, (1, 0), None, None),
        ({"better": {"path": "l", "first": [1], "second": [2]}}, {"l": "1"}, (0, 1), None, None),
        ({"better": {"path": "l", "first": [1], "second": [2]}}, {"l": 2.0}, (1, 0), None, None),
        ({"better": {"path": "l", "first": [True], "second": [False]}}, {"l": False}, (1, 0), None, None),
        ({"better": {"path": "l", "first": ["A"], "second": ["B"], "tie": ["T"]}}, {"l": "T"}, (0, 0), 0.5, None),
        ({"better": {"signed": "s", "negative": "first", "margin": True}}, {"s": -3}, (0, 1), None, 3.0),
        ({"better": {"signed": "s", "negative": "second", "margin": True}}, {"s": "-1"}, (1, 0), None, 1.0),
        ({"better": {"signed": "s", "negative": "first"}}, {"s": 2}, (1, 0), None, None),
        ({"better": {"signed": "s", "negative": "first"}}, {"s": 0}, (0, 0), 0.5, None),
        ({"better": {"higher": ["x", "y"], "margin": True}}, {"x": 1, "y": 3.5}, (1, 0), None, 2.5),
        ({"better": {"higher": "s"}}, {"s": [2, 1]}, (0, 1), None, None),
        ({"better": {"higher": ["x", "y"]}, "margin": {"difference": ["m", "n"]}},
         {"x": 2, "y": 1, "m": 5, "n": 1}, (0, 1), None, 4.0),
        ({"soft_label": "p"}, {"p": "0.75"}, (0, 1), 0.75, None),
        ({"soft_label": {"votes": "v", "first": [1], "second": [2], "tie": [0]}},
         {"v": [1, 0, 2, 1]}, (0, 1), 0.625, None),
        ({"soft_label": {"votes": ["v", "w"], "first": ["A"], "second": ["B"], "drop": ["?"]}},
         {"v": "B", "w": "?"}, (1, 0), 0.0, None),
        ({"soft_label": {"counts": ["v", "w"]}}, {"v": 1, "w": 3}, (1, 0), 0.25, None),
        ({"soft_label": {"counts": ["v", "w", "t"]}}, {"v": 0, "w": 0, "t": 1}, (0, 0), 0.5, None),
    ],
)  # fmt: skip
def test_labels_of_two_responses(
    label: dict[str, Any], values: dict[str, Any], ranks: tuple[int, int], soft: float | None, margin: float | None
) -> None:
    group = read({**TWO, **label}, {**TEXTS, **values})
    assert (group.responses, group.ranks, group.soft_label, group.margin) == (("4", "5"), ranks, soft, margin)


@pytest.mark.parametrize(
    ("label", "values", "reason", "detail"),
    [
        ({"better": {"path": "l", "first": ["A"], "second": ["B"]}}, {"l": "C"}, "bad_label", r"l='C' is none of the"),
        ({"better": {"path": "l", "first": ["A"], "second": ["B"], "drop": ["both bad"]}},
         {"l": "both bad"}, "no_preference", "a label that the map leaves out"),
        ({"better": {"signed": "s", "negative": "first", "zero": "drop"}}, {"s": 0}, "no_preference", "neither"),
        ({"better": {"higher": ["x", "y"], "equal": "drop"}}, {"x": 1, "y": 1}, "no_preference", "neither response"),
        ({"better": {"higher": "s"}}, {"s": [1, 2, 3]}, "bad_label", "s has 3 numbers, not 2"),
        ({"soft_label": {"votes": "v", "first": [1], "second": [2]}}, {"v": []}, "bad_label", "v: nobody voted"),
        ({"soft_label": {"counts": ["v", "w"]}}, {"v": -1, "w": 3}, "bad_label", "no 2 or 3 numbers of votes"),
        ({"soft_label": "p"}, {"p": 1.5}, "bad_label", "not a probability"),
    ],
)  # fmt: skip
def test_labels_that_say_nothing(label: dict[str, Any], values: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(RejectedRow, match=f"{reason}: .*{detail}"):
        read({**TWO, **label}, {**TEXTS, **values})


def test_ranks_and_scores_of_a_list() -> None:
    columns = {"prompt": "q", "responses": "a[*].t", "ranks": "a[*].r"}
    row = {"q": "x", "a": [{"t": "1", "r": 3.0}, {"t": "2", "r": 1.0}]}
    assert read(columns, row, "ranked").ranks == (1, 0)
    columns = {"prompt": "q", "responses": ["a", "b"], "scores": ["s", "t"]}
    assert read(columns, {**TEXTS, "s": "0.1", "t": "0.9"}, "ranked").ranks == (1, 0)
    equal = {**TEXTS, "s": 1, "t": 1}
    assert read({**columns, "equal": "tie"}, equal, "ranked").soft_label == 0.5
    with pytest.raises(RejectedRow, match="no_preference"):
        read(columns, equal, "ranked")
    with pytest.raises(RejectedRow, match=r"too_many_responses: responses has 1,001"):
        read({"prompt": "q", "responses": "r", "scores": "r"}, {"q": "x", "r": list(range(1001))}, "ranked")


def test_system_and_messages_of_any_naming() -> None:
    columns = {
        "system": "s?",
        "prompt": "turns",
        "chosen": "good",
        "rejected": "bad",
        "messages": {"role": "speaker", "content": "said", "roles": {"Human": "user", "Bot": "assistant"}},
    }
    row = {
        "s": "Be brief.",
        "turns": [{"speaker": "Human", "said": "2 + 2?", "mood": "calm"}],
        "good": {"speaker": "Bot", "said": "4"},
        "bad": "5",
    }
    group = read(columns, row, "conversational")
    assert group.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    assert group.responses == ([{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "5"}])
    assert read(columns, {**row, "s": None}, "conversational").prompt == group.prompt[1:]
    with pytest.raises(RejectedRow, match="bad_conversation"):
        read(columns, {**row, "turns": [{"speaker": "Cat", "said": "meow"}]}, "conversational")


def test_a_system_message_before_whole_conversations() -> None:
    user = {"role": "user", "content": "2 + 2?"}
    row = {"s": "Be brief.", "c": [user, {"role": "assistant", "content": "4"}],
           "r": [user, {"role": "assistant", "content": "5"}]}  # fmt: skip
    group = read({"system": "s", "chosen": "c", "rejected": "r"}, row, "conversational")
    assert group.prompt == [{"role": "system", "content": "Be brief."}, user]


def test_subset_and_id_are_carried_unless_the_map_says_otherwise() -> None:
    row = {"q": "x ", "a": "1", "b": "2", "kind": "maths", "id": 7, "topic": "sums", "key": "k"}
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    group = read(columns, row, "explicit_prompt", subset_column="kind")
    assert (group.subset, group.id) == ("maths", "7")
    group = read({**columns, "subset": "topic", "id": "key"}, row, "explicit_prompt", subset_column="kind")
    assert (group.subset, group.id) == ("sums", "k")


# --- Context that the map does not read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"system": "You are a pirate."}, "system"),
        ({"context": "It happened in Rome."}, "context"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"prompt": "another question altogether"}, "prompt"),
    ],
)
def test_context_that_the_map_does_not_read_is_refused(others: dict[str, Any], named: str) -> None:
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(RejectedRow, match=f"unread_context: {named} holds"):
        read(columns, {**TEXTS, **others}, "explicit_prompt")
    assert read(columns, {**TEXTS, **others}, "explicit_prompt", ignore_columns=(named,)).prompt == "2 + 2? "
    if named != "tools":
        assert read({**columns, "not_meant": [named]}, {**TEXTS, **others}, "explicit_prompt").prompt == "2 + 2? "


def test_context_that_is_part_of_what_is_read_is_no_loss() -> None:
    columns = {"prompt": {"template": "{context}\n{q}"}, "chosen": "a", "rejected": "b"}
    row = {**TEXTS, "context": "It happened in Rome.", "history": "It happened in Rome."}
    assert read(columns, row, "explicit_prompt").prompt.startswith("It happened in Rome.\n2 + 2?")


def test_tools_that_a_map_reads_need_messages() -> None:
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "tools": "t"}
    row = {**TEXTS, "t": [{"type": "function", "function": {"name": "f"}}]}
    with pytest.raises(RejectedRow, match="unread_context: tools holds"):
        read(columns, row, "explicit_prompt")
    assert read({**columns, "as_messages": True}, row, "conversational").tools == row["t"]


def test_a_margin_beside_the_better_response_is_read_without_a_map() -> None:
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "margin": 2}
    group = RowReader("soft_label").read(row, 0)
    assert (group.ranks, group.margin) == ((1, 0), 2.0)
