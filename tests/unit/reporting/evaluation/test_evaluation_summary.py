"""`evaluation.md` and the printed summary say what the document says, whatever subsets and files are called."""

from __future__ import annotations

import re
from dataclasses import replace

from rm_scale.evaluation.evaluate import Resampling, ScoredModel, evaluate_all, gate_metrics
from rm_scale.evaluation.evaluation_document import EvaluationDocument
from rm_scale.evaluation.requirements import judge, read_requirements
from rm_scale.reporting.evaluation.evaluation_summary import card_section, escape, markdown_summary, table, text_summary
from rm_scale.training.pair_counts import ScoredGroup

BENCHMARK = {
    "name": "RewardBench",
    "source": "a paper",
    "score": None,
    "parts": {"Chat": 0.25},
    "subsets": {"mt-bench-easy": {"num_items": 28, "score": 0.25}},
    "missing": ["Safety: donotanswer"],
    "num_items": 28,
    "num_unscored": 2,
}
NASTY = "a|b <script>alert(1)</script> `x`\n# heading"


def document() -> EvaluationDocument:
    groups = [
        ScoredGroup(
            [1.0, 0.0], [0, 1], subset=NASTY, lengths=[5, 3], source="/data/a.jsonl", prompt="p", id="1", content="1"
        ),
        ScoredGroup(
            [0.0, 1.0], [0, 1], subset="b", lengths=[3, 5], source="/data/b.jsonl", prompt="p", id="2", content="2"
        ),
        ScoredGroup(
            [2.0, 0.5], [0, 1], subset="b", lengths=[4, 4], source="/data/b.jsonl", prompt="q", id="3", content="3"
        ),
    ]
    first = ScoredModel("new", "runs/new", groups)
    second = replace(first, name="old", path="runs/old", groups=[replace(g, rewards=g.rewards[::-1]) for g in groups])
    return evaluate_all([first, second], Resampling(100), {"new": {"rb.jsonl": BENCHMARK}})


def test_tables_have_as_many_cells_as_columns_whatever_names_hold() -> None:
    text = markdown_summary(document())
    assert "<script>" not in text.replace("\\<script\\>", "")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1, block
    assert escape(NASTY) == "a\\|b \\<script\\>alert(1)\\</script\\> \\`x\\` \\# heading"
    assert escape("") == "(no name)"
    assert table(["a"], [["b"]]) == "| a |\n| --- |\n| b |"


def test_every_part_is_in_the_summary() -> None:
    results = document()
    results["gate"] = judge(read_requirements(["accuracy>=0.9"]), gate_metrics(results))
    text = markdown_summary(results)
    for part in (
        "## Requirements",
        "**failed**",
        "## new",
        "## old",
        "## Comparison",
        "## new on rb.jsonl",
        "### Ties",
    ):
        assert part in text
    assert "| all | 3 | 2 | 0.6667 |" in text
    assert "| source /data/b.jsonl | 2 | 2 | 0.5000 |" in text
    assert "| Chat | - | 0.2500 |\n| subset mt-bench-easy | 28 | 0.2500 |" in text
    assert "No overall score: the file lacks Safety: donotanswer." in text
    assert "2 of 28 items could not be scored and count as lost." in text
    printed = text_summary(results)
    assert "new against old: accuracy +0.3333" in printed
    assert "over 2 prompts the interval is" in printed
    assert "new, rb.jsonl: RewardBench -; Chat 0.2500; no overall score, as the file lacks Safety" in printed
    card = card_section(results)
    assert "On a.jsonl, b.jsonl, 20" in card and "/data" not in card and "### rb.jsonl" in card and "runs/" not in card
