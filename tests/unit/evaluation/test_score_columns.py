"""Scores that were made elsewhere: the shapes of real files, what is no score, and who is right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_scale.errors import DataError
from rm_scale.evaluation.evaluate import ScoredModel
from rm_scale.evaluation.score_columns import ColumnRequest, read_column_scores

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, *words: str, **settings: Any) -> ScoredModel:
    (found,) = read_column_scores([str(path)], ColumnRequest(words, **settings))
    return found


def seen(model: ScoredModel) -> list[tuple[list[float], list[int]]]:
    return [(list(group.rewards), list(group.ranks)) for group in model.groups]


# --- Shapes of files -------------------------------------------------------------------------------------------------

# Two of RewardBench's columns of results, three rows; a number may stand in a list of one.
REWARDBENCH = {
    "chat_template": "tokenizer",
    "id": [30, 31, 32],
    "model": "some/model",
    "model_type": "Seq. Classifier",
    "results": [1, 0, 0],
    "scores_chosen": [[1.5], [0.25], [2.0]],
    "scores_rejected": [[0.5], [0.75], [2.0]],
    "subset": ["alpacaeval-easy", "math-prm", "math-prm"],
    "text_chosen": ["a", "b", "c"],
    "text_rejected": ["d", "e", "f"],
}
EXPECTED = [([1.5, 0.5], [0, 1]), ([0.25, 0.75], [0, 1]), ([2.0, 2.0], [0, 1])]


def as_rows(table: dict[str, Any]) -> Rows:
    lists = {key: value for key, value in table.items() if isinstance(value, list)}
    return [{key: value[row] for key, value in lists.items()} for row in range(len(lists["id"]))]


def as_pandas(table: dict[str, Any]) -> dict[str, Any]:
    lists = {key: value for key, value in table.items() if isinstance(value, list)}
    return {key: {str(place): one for place, one in enumerate(value)} for key, value in lists.items()}


@pytest.mark.parametrize(
    "kind", ["table", "pandas", "rows", "wrapped", "lines", "one line", "csv", "parquet", "one row"]
)
@pytest.mark.parametrize(
    "words", [(), ("scores_chosen",), ("scores_chosen,scores_rejected",), ("scores_chosen", "scores_rejected")]
)
def test_rewardbench_results_in_every_shape(tmp_path: Path, kind: str, words: tuple[str, ...]) -> None:
    rows = as_rows(REWARDBENCH)
    path = tmp_path / "results.json"
    if kind in {"csv", "parquet", "one row"}:
        path = tmp_path / f"results.{'csv' if kind == 'csv' else 'parquet'}"
    if kind == "csv":
        lines = [
            ",".join(map(str, (row["subset"], row["scores_chosen"][0], row["scores_rejected"][0]))) for row in rows
        ]
        path.write_text("\n".join(["subset,scores_chosen,scores_rejected", *lines]) + "\n")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "one row":  # as `datasets` reads the JSON table
        pq.write_table(pa.Table.from_pylist([REWARDBENCH]), path)
    elif kind == "lines":
        write(path, rows)
    else:
        content: Any = {"table": REWARDBENCH, "pandas": as_pandas(REWARDBENCH), "rows": rows}.get(kind, REWARDBENCH)
        content = {"model": "m", "data": rows} if kind == "wrapped" else content
        path.write_text(json.dumps(content, indent=None if kind == "one line" else 4, sort_keys=True))
    found = read(path, *words)
    assert seen(found) == EXPECTED
    assert [group.subset for group in found.groups] == ["alpacaeval-easy", "math-prm", "math-prm"]
    assert found.data is not None and found.data["tied_rows"] == {"count": 1, "first_rows": [2]}


def test_what_a_file_of_results_says_itself_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(REWARDBENCH))
    with caplog.at_level("INFO", logger="rm_scale"):
        read(path)
    assert "the file's own column results agrees in all 3 rows" in caplog.text
    path.write_text(json.dumps({**REWARDBENCH, "results": [1, 1, 0]}))
    caplog.clear()
    read(path)
    assert "in 1 of 3 rows the file's own column results is not what the scores say" in caplog.text


def test_columns_that_differ_in_length_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**REWARDBENCH, "results": [1]}))
    with pytest.raises(DataError, match=r"columns differ in length \(id 3, results 1, .* Fix: write the file again"):
        read(path)


JUDGED = {"judgment": {"judge_model": "m", "scores": [1.0, 2.0]}, "decision": "B>A"}
RM_BENCH = {"id": "1", "score_chosen": [[3.0], [1.0], [2.0]], "score_rejected": [0.0, 1.0, 5.0]}


@pytest.mark.parametrize(
    ("row", "words", "rewards", "ranks"),
    [
        ({"label": "B>A", "judgments": [JUDGED]}, ("judgments[0].judgment.scores",), [1, 2], [1, 0]),
        ({"label": "B>A", "judgments": [JUDGED]}, (), [1, 2], [1, 0]),
        (RM_BENCH, ("score_chosen",), [3, 1, 2, 0, 1, 5], [0, 0, 0, 1, 1, 1]),
        ({"scores": [[3], [1], [2]]}, ("scores",), [3, 1, 2], [0, 1, 1]),
        ({"scores": [[3, 1, 2]]}, ("scores",), [3, 1, 2], [0, 1, 1]),
        ({"scores": "[3, 1, 2]"}, ("scores",), [3, 1, 2], [0, 1, 1]),
        ({"scores": [3, 1, 2], "num_correct": 2, "subset": "Ties"}, (), [3, 1, 2], [0, 0, 1]),
        ({"rewards": [3, 1, 2], "ranks": [3, 1, 2]}, (), [3, 1, 2], [2, 0, 1]),
        ({"rewards": [3, 1, 2], "ranks": [0, 1, 1]}, (), [3, 1, 2], [0, 1, 1]),
        ({"score_1": 1, "score_2": 5, "score_10": 2, "scores": [True, False, True]}, (), [1, 5, 2], [0, 1, 0]),
        ({"score_1": 1, "score_2": 5, "winner": "model_b"}, ("score_1,score_2",), [1, 5], [1, 0]),
        ({"score_1": 1, "score_2": 5, "winner": "tie (bothbad)"}, ("score_*",), [1, 5], [0, 0]),
        ({"good": 1, "bad": "0.5"}, ("good,bad",), [1, 0.5], [0, 1]),
        ({"chosen": 1.5, "rejected": 1}, ("chosen,rejected",), [1.5, 1], [0, 1]),
        ({"a,b": [1, 2]}, ("a,b",), [1, 2], [0, 1]),
        ({"rewards": [1, 2], "soft_label": 0.2}, (), [1, 2], [1, 0]),
        ({"rewards": [1, 2, 3], "gold": [5, 7, 7]}, ("rewards",), [1, 2, 3], [0, 1, 1]),
    ],
)
def test_shapes_of_rows(tmp_path: Path, row: Any, words: tuple[str, ...], rewards: Any, ranks: Any) -> None:
    assert seen(read(write(tmp_path / "x.jsonl", [row]), *words)) == [(rewards, ranks)]


def test_a_column_of_labels_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"rewards": [1, 2, 3], "gold": [5, 7, 7]}])
    assert seen(read(path, "rewards", label_column="gold")) == [([1, 2, 3], [1, 0, 0])]
    with pytest.raises(DataError, match=r"--label_column glod: .* Fix: did you mean gold"):
        read(path, "rewards", label_column="glod")


def test_scores_of_another_model_are_no_labels(tmp_path: Path) -> None:
    row = {"new": [1, 2, 3], "scores": [0.5, 2.5, 0.25]}
    path = write(tmp_path / "x.jsonl", [row])
    assert seen(read(path, "new")) == [([1, 2, 3], [0, 1, 1])]
    both = read_column_scores([str(path)], ColumnRequest(("new", "scores")))
    assert [seen(one)[0][1] for one in both] == [[0, 1, 1], [0, 1, 1]]
    ranked = write(tmp_path / "y.jsonl", [{**row, "responses": ["a", "b", "c"], "prompt": "p"}])
    assert seen(read(ranked, "new")) == [([1, 2, 3], [1, 0, 2])], "as training reads such a file"


SHP = {"post_id": "p", "history": "How?", "human_ref_A": "So.", "human_ref_B": "Or so."}


def test_labels_of_shp_say_whether_the_first_is_the_better_one(tmp_path: Path) -> None:
    """Stanford Human Preferences, card of stanfordnlp/SHP: 1 where A is preferred to B, 0 where B is."""
    rows = [{**SHP, "labels": label, "scores": [1, 2]} for label in (1, 0, 1)]
    path = write(tmp_path / "x.jsonl", rows)
    for settings in ({}, {"label_column": "labels"}):
        assert [ranks for _, ranks in seen(read(path, "scores", **settings))] == [[0, 1], [1, 0], [0, 1]]
    assert seen(read(write(path, rows[:1]), "scores")) == [([1, 2], [0, 1])], "with one value it is as clear"
    wrong = write(path, [{**row, "labels": 2} for row in rows])
    with pytest.raises(DataError, match=r"labels=2 .*1 where the first of two is preferred, 0 where the second is"):
        read(wrong, "scores")


@pytest.mark.parametrize("name", ["preference", "human_preference", "preferred", "better_response"])
@pytest.mark.parametrize(("value", "ranks"), [("B", [1, 0]), ("model_a", [0, 1]), ("tie", [0, 0])])
def test_words_of_preference_are_read_unasked(tmp_path: Path, name: str, value: str, ranks: list[int]) -> None:
    path = write(tmp_path / "x.jsonl", [{"scores": [1, 2], name: value}])
    assert seen(read(path)) == [([1, 2], ranks)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", 1),
        ("correct", True),
        ("preference", 2),
        ("preferred", "left"),
        ("chosen_index", 0),
        ("human_rating", [3, 5]),
        ("human_vote", "B"),
        ("gold_label", "b"),
        ("preferredResponse", 1),
    ],
)
def test_what_looks_like_a_label_is_never_passed_over(tmp_path: Path, name: str, value: Any) -> None:
    path = write(tmp_path / "x.jsonl", [{"scores": [1, 2], name: value}])
    with pytest.raises(DataError) as raised:
        read(path)
    text = str(raised.value)
    assert f"{name} (" in text and f"--label_column {name}" in text and f"--ignore_columns {name}" in text
    assert seen(read(path, ignore_columns=(name,))) == [([1, 2], [0, 1])]
    said = {"scores_chosen": 1, "scores_rejected": 2, name: value}
    assert seen(read(write(path, [said]))) == [([1, 2], [0, 1])], "the names of the scores say which is better"


@pytest.mark.parametrize(
    "others",
    [
        {"human_ref_A": "Yes.", "human_ref_B": "No."},
        {"label_source": "crowd", "gold_answer": "42", "correct_answer": "42"},
        {"preferred": None, "results": 1, "subset": "best", "id": 7},
        {"better_response": "A whole answer, which is a text of its own and names no response."},
    ],
)
def test_other_columns_do_not_look_like_labels(tmp_path: Path, others: dict[str, Any]) -> None:
    assert seen(read(write(tmp_path / "x.jsonl", [{"scores": [1, 2], **others}]))) == [([1, 2], [0, 1])]


def test_numbers_of_responses_count_from_0_or_1(tmp_path: Path) -> None:
    def ranks(*labels: Any) -> list[list[int]]:
        path = write(tmp_path / "x.jsonl", [{"rewards": [1, 2], "label": label} for label in labels])
        return [list(group.ranks) for group in read(path).groups]

    assert ranks(1, 2) == ranks("1", "2") == ranks(0, 1) == [[0, 1], [1, 0]]
    with pytest.raises(DataError, match="label is 1 in every row, which may be the first response"):
        ranks(1, 1)


def test_long_files(tmp_path: Path) -> None:
    """One score per row, as `rm-scale score` writes."""
    rows = [
        {"prompt": "p", "completion": "a", "label": 1, "score": 2.5},
        {"prompt": "q", "completion": "a", "label": 0, "score": 1},
        {"prompt": "p", "completion": "b", "label": 0, "score": 3},
        {"prompt": "q", "completion": "b", "label": 1, "score": 2},
        {"prompt": "q", "completion": "c", "label": 1, "score": 0},
    ]
    path = write(tmp_path / "x.jsonl", rows)
    assert seen(read(path, "score")) == [([2.5, 3], [0, 1]), ([1, 2, 0], [1, 0, 0])]
    lonely = write(tmp_path / "y.jsonl", [*rows, {"prompt": "r", "label": 1, "score": 0}])
    with pytest.raises(DataError, match=r"1 of 3 can't be used\. single_response: 1 .* rows 5; .*prompt of row 5"):
        read(lonely, "score")
    other = write(tmp_path / "z.jsonl", [{"score": 1.0, "text": "a"}])
    with pytest.raises(DataError, match=r"which response is the better one and which rows belong together \(it has"):
        read(other, "score")


# --- What is no score ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "reason", "detail"),
    [
        (None, "missing_score", "scores_chosen is absent or null"),
        ("", "missing_score", "scores_chosen is empty"),
        ([], "missing_score", "scores_chosen is empty"),
        ([None], "missing_score", "scores_chosen holds null"),
        (math.nan, "nan_score", "scores_chosen holds NaN"),
        ("NaN", "nan_score", "scores_chosen holds NaN"),
        (math.inf, "infinite_score", "scores_chosen holds inf"),
        ("-inf", "infinite_score", "scores_chosen holds -inf"),
        (1e39, "infinite_score", "scores_chosen holds 1e+39"),
        (10**400, "infinite_score", "scores_chosen holds inf"),
        ("$ERROR$", "bad_score", "scores_chosen holds '$ERROR$'"),
        (True, "bad_score", "scores_chosen holds True"),
        ({"a": 1}, "bad_score", "scores_chosen holds {'a': 1}"),
    ],
)
def test_what_is_no_score_is_named_with_its_row(
    tmp_path: Path, chosen: Any, reason: str, detail: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows: Rows = [{"scores_chosen": 1.0, "scores_rejected": number / 4} for number in range(20)]
    rows[7]["scores_chosen"] = chosen
    path = write(tmp_path / "x.jsonl", rows)
    found = read(path)
    (entry,) = (found.data or {})["rejected"]
    assert (entry["reason"], entry["count"], entry["first_rows"]) == (reason, 1, [7])
    assert f"{reason}: 1 (" in caplog.text and f"rows 7; the first: {detail}" in caplog.text
    assert found.data is not None and found.data["num_pairs_lost"] == 1
    # 0, 1/4, 1/2, 3/4 are below 1, which is a tie, and all others above; row 7 is above, too.
    assert found.data["accuracy_if_lost"] == 4 / 20 and len(found.groups) == 19
    with pytest.raises(DataError, match=r"1 of 20 can't be used\. .* Fix: correct these rows, or .* 0\.05"):
        read(path, max_rejected_share=0.04)


def test_scores_that_do_not_fit_their_labels(tmp_path: Path) -> None:
    rows: Rows = [{"rewards": [2, 1, 0], "num_correct": 1} for _ in range(40)]
    rows[3] = {"rewards": [2, 1], "num_correct": 1}
    rows[5] = {"rewards": [2], "num_correct": 1}
    found = read(write(tmp_path / "x.jsonl", rows), max_rejected_share=0.05)
    assert found.data is not None and found.data["group_sizes"] == {"2": 1, "3": 38}
    assert [(one["reason"], one["first_rows"]) for one in found.data["rejected"]] == [("ragged_scores", [5])]
    ranks = write(tmp_path / "y.jsonl", [{"rewards": [2, 1], "ranks": [0, 1, 2]}])
    with pytest.raises(DataError, match=r"ragged_scores: 1 .* rows 0; the first: 2 scores, and 3 values of ranks"):
        read(ranks)


def test_lines_that_are_no_rows_are_counted(tmp_path: Path) -> None:
    good = json.dumps({"scores": [1, 2]})
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([good, "{broken", "3", good]) + "\n")
    with pytest.raises(DataError, match=r"2 of 4 can't be used\. bad_json: 1 .*rows 1; .*wrong_type: 1 .*rows 2"):
        read(path)
    assert len(read(path, max_rejected_share=0.5).groups) == 2


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"scores_chosen": 1, "scores_rejected": 0, "prompt": "p"}])
    with pytest.raises(DataError, match=r"--score_column 'scores_chosn': .* Fix: did you mean scores_chosen"):
        read(path, "scores_chosn")
    for word in ("", ","):
        with pytest.raises(DataError, match=rf"--score_column '{word}': .* has no such column"):
            read(path, word)
    with pytest.raises(DataError, match="has no column of scores with a known name; it has prompt"):
        read(write(tmp_path / "y.jsonl", [{"prompt": "p"}]))
    with pytest.raises(DataError, match=r"--group_column prompt: .* holds all scores of a group in one row"):
        read(path, group_column="prompt")


# --- Who is who ------------------------------------------------------------------------------------------------------


def test_groups_are_recognised_by_what_they_say_or_by_their_id(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b", "scores": [n, 1]} for n in range(3)]
    first = read(write(tmp_path / "a.jsonl", pairs))
    second = read(write(tmp_path / "b.jsonl", pairs[::-1]))
    assert [group.content for group in first.groups] == [group.content for group in second.groups][::-1]
    assert all(group.content and group.prompt for group in first.groups)
    named = read(write(tmp_path / "c.jsonl", [{"id": f"x{n}", "scores": [n, 1]} for n in range(2)]))
    assert [(group.id, group.content) for group in named.groups] == [("x0", ""), ("x1", "")]
    repeated = read(write(tmp_path / "d.jsonl", [{"id": "x", "scores": [n, 1]} for n in range(2)]))
    assert [group.id for group in repeated.groups] == ["0", "1"]
