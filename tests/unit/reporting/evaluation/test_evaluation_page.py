"""The page of an evaluation shows every part of its document, and none that isn't there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rm_scale.cli import main
from rm_scale.reporting.evaluation.evaluation_page import write_page
from tests.unit.reporting.test_page import check_page


def scores_file(path: Path, seed: int, skill: float) -> Path:
    """Rewards of 80 pairs in two subsets; some tie."""
    chance = random.Random(seed)
    lines = []
    for number in range(80):
        good = chance.gauss(skill, 1)
        bad = good if number == 3 else chance.gauss(0, 1)
        row = {
            "id": str(number),
            "subset": "maths" if number % 2 else "<b>chat</b>",
            "ranks": [0, 1],
            "rewards": [good, bad],
        }
        row |= {"lengths": [20 + number % 7, 22], "source": f"{number % 3}.jsonl", "prompt": f"{number // 2:016x}"}
        lines.append(json.dumps({**row, "content": f"{number:016x}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes for two models' scores."""
    folder = tmp_path_factory.mktemp("eval")
    first, second = scores_file(folder / "a.jsonl", 1, 1.5), scores_file(folder / "b.jsonl", 2, 0.0)
    words = ["eval", "--scores", str(first), "--compare", str(second), "--output", str(folder / "out")]
    assert main([*words, "--require", "accuracy>=0.99"]) == 1, "the gate fails"
    html = (folder / "out" / "evaluation.html").read_text()
    check_page(html)
    return dict(json.loads((folder / "out" / "evaluation.json").read_text()))


def test_every_part_is_shown(document: dict[str, Any], tmp_path: Path) -> None:
    document = json.loads(json.dumps(document))
    document["benchmarks"] = {
        "a": {
            "rb.jsonl": {
                "name": "RewardBench",
                "source": "somewhere",
                "score": None,
                "parts": {"Chat": 0.5},
                "subsets": {"alpacaeval-easy": {"num_items": 3, "score": 0.5}},
                "missing": ["Reasoning: hep-go"],
            }
        }
    }
    data = {"sources": ["x.jsonl"], "rows_read": 81, "rows_used": 80}
    rejected = {"source": "x.jsonl", "reason": "bad_json", "meaning": "no JSON", "count": 1, "first_rows": [7]}
    document["models"][0]["data"] = {**data, "rejected": [rejected]}
    html = write_page(document, tmp_path / "page.html").read_text()
    check_page(html)
    for title in ("Requirements", "Subsets", "Sources", "Margins", "Calibration", "Length", "Ties", "Comparison"):
        assert f"<h2>{title}</h2>" in html
    assert '<td class="bad">fails</td>' in html and "is better</td>" in html
    assert "No overall score: rb.jsonl lacks Reasoning: hep-go." in html
    assert "80 of 81 rows of x.jsonl." in html and "x.jsonl: bad_json" in html
    assert "<b>chat</b>" not in html and "&lt;b&gt;chat&lt;/b&gt;" in html
    assert document["models"][0]["name"] in html and document["created"] in html
    assert html.count("<svg") >= 12


def test_what_is_not_there_is_not_shown(document: dict[str, Any], tmp_path: Path) -> None:
    alone = {**document, "models": document["models"][:1], "comparisons": [], "agreement": [], "gate": None}
    html = write_page(alone, tmp_path / "page.html").read_text()
    check_page(html)
    assert "Comparison" not in html and "Requirements" not in html
    nothing = {**alone, "models": []}
    check_page(write_page(nothing, tmp_path / "page.html").read_text())
