"""`rm-scale data` on a small file: the page, the JSON and what the terminal shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rm_scale.cli import main

Review = Callable[..., dict[str, Any]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def call(tiny_model: Path, tmp_path: Path) -> Callable[..., int]:
    """Run the command on a file."""

    def run(path: Path, *words: str) -> int:
        common = ["--model_name_or_path", str(tiny_model), "--dataset_cache_dir", str(tmp_path / "cache")]
        return main(["data", "--dataset_path", str(path), *common, *words])

    return run


def test_page_json_and_terminal(
    call: Callable[..., int], pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    swapped = {**rows[3], "chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"]}
    path = write(tmp_path / "mine.jsonl", [*rows, swapped])
    assert call(path, "--output", str(tmp_path / "out"), "--max_length", "2048") == 0
    printed = capsys.readouterr().out
    assert "! Contradicting pairs: 2 of 121 pairs" in printed and "--label_smoothing_factor 0.01" in printed
    document = json.loads((tmp_path / "out" / "data_review.json").read_text())
    first = next(finding for finding in document["findings"] if finding["name"] == "contradicting_pairs")
    assert sorted(first["examples"][0]["rows"]) == [3, 120] and document["num_groups"] == 121
    assert document["lengths"]["longest_sequence"]["max"] == document["report"]["train"]["longest_sequence"]
    page = (tmp_path / "out" / "data_review.html").read_text()
    assert "Contradicting pairs" in page and "--label_smoothing_factor 0.01" in page and "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert list((tmp_path / "cache").glob("review-*")) == [], "temporary rows are gone"


def test_results_are_not_written_over(
    call: Callable[..., int], pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data_review.html").write_text("mine")
    assert call(pairs_file, "--output", str(tmp_path)) == 2
    assert "data_review.html exists. Fix: another folder, or --overwrite." in capsys.readouterr().err
    assert call(pairs_file, "--output", str(pairs_file)) == 2
    assert "is a file. Fix: give a folder." in capsys.readouterr().err
    assert call(pairs_file, "--output", str(tmp_path / "x"), "--no_review") == 2
    assert "nothing to write with --no_review" in capsys.readouterr().err


def test_too_many_rejected_rows_still_get_their_page(
    call: Callable[..., int], pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()][:20]
    path = write(tmp_path / "mine.jsonl", [*rows, *({**row, "rejected": ""} for row in rows)])
    assert call(path, "--output", str(tmp_path / "out")) == 2
    assert "20 of 40 rows can't be used" in capsys.readouterr().err
    assert "empty" in (tmp_path / "out" / "data_review.html").read_text()


def test_without_a_review(call: Callable[..., int], pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(pairs_file, "--no_review") == 0
    assert capsys.readouterr().out == ""
