"""`rm-scale data --against`: what is printed and written, and wrong options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rm_scale.cli import main

Run = Callable[..., int]


@pytest.fixture
def call(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Run:
    """Run the command on 120 pairs."""

    def run(*words: str) -> int:
        common = ["--model_name_or_path", str(tiny_model), "--dataset_cache_dir", str(tmp_path / "cache")]
        return main(["data", "--dataset_path", str(pairs_file), *common, *words])

    return run


def test_against_drop_and_kept(call: Run, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    questions = [{"prompt": "Which words does nobody ever put together like this one?"}, {"prompt": rows[5]["prompt"]}]
    against = tmp_path / "questions.jsonl"
    against.write_text("".join(json.dumps(row) + "\n" for row in questions))
    out, drop, kept = tmp_path / "out", tmp_path / "dropped.jsonl", tmp_path / "kept"
    options = ["--against", str(against), "--output", str(out), "--drop", str(drop), "--kept", str(kept)]
    assert call(*options) == 0
    matched = [number for number, row in enumerate(rows) if row["prompt"] == rows[5]["prompt"]]
    printed = capsys.readouterr().out
    assert f"contamination: {len(matched)} of 120 training rows" in printed
    assert f"! {against} (questions in column prompt, 2 rows): 1 of its rows (50.0%)" in printed
    assert f"prompts: training rows: {len(matched)} exact; rows of the file: 1 exact" in printed
    assert "Fix: --drop FILE.jsonl lists the rows; --kept DIR writes the data without them." in printed
    figures = json.loads((out / "contamination.json").read_text())
    assert figures["train_rows_matched"] == len(matched)
    review = json.loads((out / "data_review.json").read_text())
    assert review["contamination"] == figures
    assert review["findings"][0]["title"] == f"Training rows that are in {against}"
    assert "Training rows that are in" in (out / "data_review.html").read_text()
    assert [json.loads(line)["row"] for line in drop.read_text().splitlines()] == matched
    (file,) = kept.iterdir()
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        row for number, row in enumerate(rows) if number not in matched
    ]
    assert call(*options) == 2
    told = capsys.readouterr().err
    assert f"--drop {drop}: exists. Fix: another name, or --overwrite." in told
    assert f"--kept {kept}: is not empty. Fix: give a new folder." in told
    assert "contamination.json exists" in told


def test_without_the_review(call: Run, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--against", str(pairs_file), "--no_review", "--output", str(tmp_path / "out")]
    assert call(*options, "--kept", str(tmp_path / "kept")) == 0
    printed = capsys.readouterr()
    assert "120 of 120 training rows (100.0%) match rows of the file" in printed.out
    assert f"kept: no row is left, and nothing was written to {tmp_path / 'kept'}" in printed.err
    figures = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert figures["train_rows_matched"] == figures["train_rows"] == 120 and figures["share"] == 1


def test_wrong_options(call: Run, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--drop", str(tmp_path / "x.jsonl")) == 2
    assert "says nothing without --against. Fix: --against FILE." in capsys.readouterr().err
    words = ["--against", str(tmp_path / "none.jsonl"), "--drop", str(tmp_path / "x.csv"), "--kept", str(pairs_file)]
    assert call(*words) == 2
    told = capsys.readouterr().err
    assert f"--against {tmp_path / 'none.jsonl'}: there is no such file." in told
    assert "is written as JSON Lines. Fix: a name that ends in .jsonl." in told
    assert f"--kept {pairs_file}: is a file. Fix: give a folder." in told
