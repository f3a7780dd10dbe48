"""`rm-scale eval --score_column`: no model is loaded, and scores made elsewhere are judged like a model's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rm_scale.cli import main
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import REPOSITORY, read_json, read_lines

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Forty pairs with two models' scores: the first is right in 30, the second in 20 of which 10 are the first's."""
    rows = [
        {
            "id": f"q{number}",
            "prompt": f"{number} + 1 =",
            "chosen": f" {number + 1}",
            "rejected": " no",
            "subset": "even" if number % 2 == 0 else "odd",
            "new": [2.0 + number / 8, 2.0] if number < 30 else [0.5, 1.0 + number / 8],
            "old_chosen": float(number >= 20),
            "old_rejected": 0.5,
        }
        for number in range(40)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


def evaluate(tmp_path: Path, *words: object) -> int:
    given = ["eval", "--output", str(tmp_path / "out"), "--overwrite", "--num_resamples", "200", *map(str, words)]
    return main(given)


def test_every_number_and_page(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requirement = "comparison.accuracy_difference>=0.2, subsets.odd.accuracy>0.5"
    words = ["--input", scored, "--score_column", "new", "old_chosen,old_rejected", "--require"]
    assert evaluate(tmp_path, *words, requirement) == 0
    document = read_json(tmp_path / "out" / "evaluation.json")
    first, second = document["models"]
    assert [first["name"], second["name"]] == ["new", "old_chosen,old_rejected"]
    assert (first["accuracy"], first["num_ties"], second["accuracy"]) == (0.725, 1, 0.5), "0 is a tie"
    (comparison,), (agreement,) = document["comparisons"], document["agreement"]
    assert (comparison["num_pairs"], comparison["num_groups_left_out"]) == (40, 0)
    assert comparison["accuracy_difference"] == pytest.approx(0.225) and agreement["both_correct"] == 10
    assert document["gate"]["passed"] and set(first["subsets"]) == {"even", "odd"}
    assert first["calibration"]["ece"] is not None and first["length_bias"]["num_pairs"] == 0
    printed = capsys.readouterr().out
    assert "read: new: the first score is of the better response; groups by their number of scores: 40 of 2" in printed
    assert "equal scores, which count as wrong: in 1 rows (0)" in printed
    for name in ("evaluation.md", "evaluation.html"):
        assert "old_rejected: the first score" in (tmp_path / "out" / name).read_text().replace("\\", "")
    # What was written is read again, and gives the same comparison with a column of the file.
    kept = tmp_path / "kept.jsonl"
    shutil.copyfile(tmp_path / "out" / second["scores_file"], kept)
    assert evaluate(tmp_path, "--input", scored, "--score_column", "new", "--compare", kept) == 0
    again = read_json(tmp_path / "out" / "evaluation.json")["comparisons"][0]
    assert again["accuracy_difference_ci95"] == comparison["accuracy_difference_ci95"]
    assert (again["first"], again["second"]) == ("pairs.jsonl", "kept.jsonl")
    assert evaluate(tmp_path, *words, "acuracy>1") == 2
    assert evaluate(tmp_path, *words, "accuracy>0.9") == 1


def test_compared_with_another_file(scored: Path, tmp_path: Path) -> None:
    """In another order, and with fewer rows."""
    rows = [{**row, "new": row["new"][::-1]} for row in read_lines(scored)[:39]]
    other = write(tmp_path / "other.jsonl", rows[::-1])
    assert evaluate(tmp_path, "--input", scored, "--score_column", "new", "--compare", other) == 0
    (comparison,) = read_json(tmp_path / "out" / "evaluation.json")["comparisons"]
    assert (comparison["num_pairs"], comparison["num_groups_left_out"]) == (39, 1)
    assert (comparison["accuracy_first"], comparison["accuracy_second"]) == pytest.approx((29 / 39, 9 / 39))


def test_compared_with_a_model(lora_run: Path, scored: Path, tmp_path: Path) -> None:
    """The model scores the texts beside the scores; its own scores in a column decide as it does."""
    rows = read_lines(scored)[:8]
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu")
    for side in ("chosen", "rejected"):
        scores = scorer.score([row["prompt"] for row in rows], [row[side] for row in rows])
        rows = [{**row, f"own_{side}": score} for row, score in zip(rows, scores, strict=True)]
    file = write(tmp_path / "own.jsonl", rows)
    words = ["--input", file, "--score_column", "own_chosen", "--compare", lora_run, "--device", "cpu"]
    assert evaluate(tmp_path, *words, "--dtype", "float32", "--dataset_cache_dir", tmp_path / "cache") == 0
    document = read_json(tmp_path / "out" / "evaluation.json")
    assert document["agreement"][0]["agreement"] == 1.0 and document["agreement"][0]["num_pairs"] == 8
    assert document["models"][0]["mean_margin"] == pytest.approx(document["models"][1]["mean_margin"], abs=1e-4)


def test_no_model_is_loaded(scored: Path, tmp_path: Path) -> None:
    """Not even the code that could."""
    code = (
        "import sys; from rm_scale.cli import main; code = main(sys.argv[1:]); "
        "print('modeling' if 'transformers.modeling_utils' in sys.modules else 'none'); raise SystemExit(code)"
    )
    command = [sys.executable, "-c", code, "eval", "--input", str(scored), "--score_column", "new"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "none", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--score_column", "new"], "--score_column: of which file is not said"),
        (["--label_column", "x", "--input", "FILE", "--model", "FILE"], "--label_column: say how --score_column is"),
        (["--score_column", "new", "--input", "FILE", "--model", "m"], "--model beside --score_column"),
        (["--score_column", "new", "--input", "FILE", "--compare", "nowhere"], "--compare nowhere: does not exist"),
        (["--score_column", "new", "--benchmark", "FILE", "--compare", "FILE"], "benchmarks are not compared pair"),
        (["--score_column", "nwe", "--input", "FILE"], "has no such column. Fix: did you mean new"),
        (["--score_column", "new", "--input", "FILE", "--model_card"], "--model_card: there is no model whose card"),
    ],
)
def test_bad_requests_are_explained(
    words: list[str], said: str, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, *(scored if word == "FILE" else word for word in words)) == 2
    error = capsys.readouterr().err
    assert said in error and "Fix:" in error and not (tmp_path / "out").exists()
