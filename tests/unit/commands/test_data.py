"""`rm-scale data` on a small file: the page, the JSON and what the terminal shows."""

from __future__ import annotations

import json
import os
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
    assert "<title>Data: /" in page
    assert "Contradicting pairs" in page and "--label_smoothing_factor 0.01" in page and "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert list((tmp_path / "cache").glob("review-*")) == [], "temporary rows are gone"


def test_a_streamed_run_s_data_is_examined_whole(
    call: Callable[..., int], pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    streaming = ["--streaming", "--max_steps", "3", "--max_length", "2048"]
    assert call(pairs_file, *streaming, "--output", str(tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "data_review.json").read_text())["num_groups"] == 120
    assert call(pairs_file, *streaming, "--no_review") == 0
    assert "these are the first training rows" in capsys.readouterr().err


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


@pytest.mark.long
@pytest.mark.skipif("RM_SCALE_HH_DATA" not in os.environ, reason="RM_SCALE_HH_DATA does not name the HH file")
def test_what_is_in_hh(call: Callable[..., int], tmp_path: Path) -> None:
    """Harmless-base: refusing and apologising is paid for, length is not, and a bag of words is right in over 55 %."""
    file = Path(os.environ["RM_SCALE_HH_DATA"])
    assert call(file, "--output", str(tmp_path / "out"), "--max_length", "4096") == 0
    document = json.loads((tmp_path / "out" / "data_review.json").read_text())
    assert document["num_rows"] == 1894 and document["num_groups"] == 1890
    found = {finding["name"]: finding for finding in document["findings"]}
    assert found["bias_apology"]["title"] == "Paid for: apology" and 0.65 < found["bias_apology"]["share"] < 0.85
    assert found["bias_refusal"]["title"].startswith("Paid for")
    assert found["length_bias"]["title"] == "The shorter response wins"
    longer = document["report"]["train"]["longer_wins_accuracy"]
    equal = document["form"]["length"]["num_equal"]
    decided = 1890 - equal
    assert document["form"]["length"]["longer_wins"] == pytest.approx((longer * 1890 - equal / 2) / decided)
    assert 0.55 < document["words"]["accuracy"] < 0.7
    assert found["contradicting_pairs"]["count"] == 0 and found["same_words"]["count"] == 2
    languages = {row["language"]: row["num_groups"] for row in document["languages"]}
    assert languages["English"] > 1750
