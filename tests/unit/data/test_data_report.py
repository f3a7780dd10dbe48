"""The report adds up, is written whole, and stops a run that would lose too much."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from rm_scale.data.data_report import (
    DataReport,
    RejectionCount,
    SourceReport,
    TextStatistics,
    log_summary,
    raise_if_too_many,
    text_statistics,
    write_data_report,
)
from rm_scale.errors import DataError


def source(used: int, lost: int, split: str = "train") -> SourceReport:
    rejected = {"empty": RejectionCount(lost, tuple(range(min(lost, 5))))} if lost else {}
    return SourceReport("file.jsonl", split, "explicit_prompt", "it fits", used + lost, used, rejected)


def statistics(
    groups: list[tuple[int, list[int], list[int]]], prompts: list[int] | None = None, keys: list[int] | None = None
) -> TextStatistics:
    """From (prompt tokens, sequence lengths, ranks) per group."""
    return text_statistics(
        np.array([prompt for prompt, _, _ in groups]),
        np.array([length for _, lengths, _ in groups for length in lengths]),
        np.array([rank for _, _, ranks in groups for rank in ranks]),
        np.array([len(ranks) for _, _, ranks in groups]),
        np.array(prompts or range(len(groups))),
        np.array(keys or range(len(groups))),
    )


def test_lengths_and_the_length_baseline_of_pairs() -> None:
    groups = [(4, [10, 6], [0, 1]), (2, [3, 7], [0, 1]), (6, [8, 8], [0, 1]), (0, [5, 9], [1, 0])]
    found = statistics(groups, prompts=[1, 1, 2, 3], keys=[1, 2, 2, 2])
    assert (found.num_groups, found.num_pairs, found.num_prompts, found.num_duplicate_groups) == (4, 4, 3, 2)
    assert (found.prompt_tokens.mean, found.prompt_tokens.max) == (3.0, 6)
    assert found.response_tokens.mean == (6 + 2 + 1 + 5 + 2 + 2 + 5 + 9) / 8 and found.response_tokens.max == 9
    assert found.longest_sequence == 10
    assert found.response_tokens.p95 == np.percentile([6, 2, 1, 5, 2, 2, 5, 9], 95)
    assert found.chosen_longer_share == 0.5
    assert (found.longer_wins_accuracy, found.shorter_wins_accuracy) == (0.625, 0.375)


def test_ranked_groups_count_every_pair_but_ties() -> None:
    found = statistics([(1, [5, 4, 3], [0, 1, 1]), (1, [5, 6], [0, 1])])
    assert found.num_pairs == 3 and found.longer_wins_accuracy == pytest.approx(2 / 3)


def test_only_ties_or_nothing_gives_no_baseline() -> None:
    assert statistics([(1, [5, 4], [0, 0])]).longer_wins_accuracy is None
    assert statistics([]) == TextStatistics()


def test_too_many_rejected() -> None:
    report = DataReport((source(90, 10),))
    raise_if_too_many(report, 0.1)
    with pytest.raises(DataError) as caught:
        raise_if_too_many(report, 0.05)
    text = str(caught.value)
    assert "10 of 100 rows can't be used (10.0%); at most 5.0% may be lost" in text
    assert "file.jsonl: empty 10 (rows 0, 1, 2, 3, 4, ...; from 0): a prompt that must not be empty" in text
    assert "Fix: correct these rows, or accept" in text and "--max_rejected_share 0.1." in text


def test_the_suggested_share_is_enough() -> None:
    report = DataReport((source(2, 1),))
    with pytest.raises(DataError) as caught:
        raise_if_too_many(report, 0.0)
    raise_if_too_many(report, float(str(caught.value).rsplit(" ", 1)[1].removesuffix(".")))


def test_each_side_is_judged_by_itself() -> None:
    report = DataReport((source(1000, 0), source(5, 5, "eval")))
    with pytest.raises(DataError, match=r"5 of 10 rows can't be used"):
        raise_if_too_many(report, 0.1)


def test_report_is_written(tmp_path: Path) -> None:
    report = DataReport((source(3, 1), source(2, 0, "eval")), eval=statistics([(1, [5, 4], [0, 1])]), held_out=0)
    rejected = [{"source": "file.jsonl", "row": 0, "reason": "empty", "detail": "response 0 has no text"}]
    write_data_report(report, rejected, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert found == report.to_dict()
    assert (found["rows_read"], found["rows_used"], found["rows_rejected"]) == (6, 5, 1)
    assert found["sources"][0]["rejected"] == {"empty": {"count": 1, "first_rows": [0], "detail": ""}}
    assert found["eval"]["longer_wins_accuracy"] == 1.0 and found["reasons"]["empty"]
    lines = (tmp_path / "run" / "rejected_rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rejected
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data_report.json", "rejected_rows.jsonl"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path) -> None:
    write_data_report(DataReport((source(1, 0),)), [], tmp_path)

    def failing():  # type: ignore[no-untyped-def]
        yield {"row": 1}
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"disk full"):
        write_data_report(DataReport((source(2, 0),)), failing(), tmp_path)
    assert (tmp_path / "rejected_rows.jsonl").read_text() == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_log_summary(caplog: pytest.LogCaptureFixture) -> None:
    report = DataReport(
        (source(3, 1),), statistics([(1, [5, 4], [0, 1])]), statistics([(1, [5, 4], [0, 0])]), shared_prompts=2
    )
    with caplog.at_level(logging.INFO):
        log_summary(report)
    for words in (
        "file.jsonl (train): 4 rows read as explicit_prompt, 3 used, 1 rejected (25.0%)",
        "empty: 1 rows, first 0",
        "'longer wins' is right in 100.0%",
        "eval: 1 groups, 0 pairs",
        "2 prompts occur both in training and in evaluation",
    ):
        assert words in caplog.text
