"""`evaluation_scores.jsonl`: what is written is what is read, and what is no such file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rm_scale.errors import DataError
from rm_scale.evaluation.final_evaluation import write_evaluation
from rm_scale.evaluation.scores_file import read_scores, score_lines
from rm_scale.training.losses import LossSettings
from rm_scale.training.pair_counts import ScoredGroup, evaluate_groups

GROUPS = [
    ScoredGroup(
        [1.5, -0.25, 0.1],
        [0, 2, 1],
        subset="ä",
        lengths=[3, 4, 5],
        id="x",
        source="a",
        prompt="p",
        content="c\N{LINE SEPARATOR}d",
    ),
    ScoredGroup([0.5, 0.5], [0, 1], margin=2.0),
    ScoredGroup([0.5, 0.0], [1, 0], soft_label=0.25),
]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_scores.jsonl"
    path.write_text(score_lines(GROUPS), encoding="utf-8")
    assert [vars(group) for group in read_scores(path)] == [
        {**vars(group), "lengths": list(group.lengths)} for group in GROUPS
    ]


def test_training_writes_what_an_evaluation_needs(tmp_path: Path) -> None:
    write_evaluation(evaluate_groups(GROUPS, LossSettings()), tmp_path)
    assert len(read_scores(tmp_path / "evaluation_scores.jsonl")) == 3
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["evaluation.json", "evaluation_scores.jsonl"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: is not JSON"),
        ("[" * 100_000, r"line 1: is not JSON \(nested more than 100 deep\)"),
        (json.dumps({"rewards": [0, 10**400], "ranks": [0, 1]}), "rewards must be a list of numbers"),
        (json.dumps({"rewards": [0, 1], "ranks": [0, 1], "margin": 10**400}), "margin must be a number"),
        ("[1]", "line 1: is not an object"),
        (json.dumps({"ranks": [0, 1]}), "rewards must be a list of numbers"),
        (json.dumps({"rewards": [0, 1]}), "ranks must be a list of whole numbers"),
        (json.dumps({"rewards": [0, 1], "ranks": [0, 1.5]}), "ranks must be a list of whole numbers"),
        (json.dumps({"rewards": [0, True], "ranks": [0, 1]}), "rewards must be a list of numbers"),
        (json.dumps({"rewards": [0], "ranks": [0, 1]}), "has 2 ranks and 1 rewards"),
        (json.dumps({"rewards": [0], "ranks": [0]}), "at least 2"),
        (json.dumps({"rewards": [0, 1], "ranks": [0, 1], "lengths": [1]}), "lengths must be as many numbers as ranks"),
        (json.dumps({"rewards": [0, 1], "ranks": [0, 1], "margin": "1"}), "margin must be a number"),
        (json.dumps({"rewards": [0, 1], "ranks": [0, 1], "soft_label": 2}), "soft_label must be between 0 and 1"),
        ("", "holds no group"),
    ],
)
def test_what_is_no_scores_file_is_refused(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=said) as caught:
        read_scores(path)
    assert "Fix: give an evaluation_scores.jsonl" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_scores(tmp_path / "none.jsonl")
