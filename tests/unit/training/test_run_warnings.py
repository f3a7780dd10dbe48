"""`run/warnings.jsonl`, and what reads it: no run that went wrong looks like one that went well."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rm_scale.files import read_json_lines
from rm_scale.logs import KEPT, get_logger, set_log_step
from rm_scale.reporting.run.run_page import RunRecords, build_run_page
from rm_scale.training.losses import LossSettings
from rm_scale.training.pair_counts import EvaluationResult, ScoredGroup, evaluate_groups
from rm_scale.training.run_warnings import begin_warnings, evaluation_warnings, read_warnings, warnings_kept

logger = get_logger(__name__)


def evaluation(right: int, wrong: int, ties: int = 0) -> EvaluationResult:
    rewards = [[1.0, 0.0]] * right + [[0.0, 1.0]] * wrong + [[0.5, 0.5]] * ties
    return evaluate_groups([ScoredGroup(pair, (0, 1)) for pair in rewards], LossSettings(), keep_ties=False)


def test_warnings_reach_the_file_with_step_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "level", logging.INFO)
    set_log_step(None)  # a training in this process may have left its last step
    with warnings_kept(is_main=True):
        logger.warning("the data is odd")  # before there is a folder
        begin_warnings(tmp_path)
        set_log_step(7)
        logger.warning("[accuracy_stuck] no better\nthan chance")
        logger.info("not kept")
        logger.info("kept", extra=KEPT)
        set_log_step(None)
    logger.warning("after the run")
    found = [(line["step"], line["name"], line["text"]) for line in read_json_lines(tmp_path / "warnings.jsonl")]
    assert found == [
        (None, None, "the data is odd"),
        (7, "accuracy_stuck", "no better\nthan chance"),
        (7, None, "kept"),
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with warnings_kept(is_main=False):
        logger.warning("the data is odd")
        begin_warnings(tmp_path)
    assert not list(tmp_path.iterdir()) and read_warnings(tmp_path) == []


def test_attempts_that_warn_of_the_same_count_once(tmp_path: Path) -> None:
    for seconds in (1.5, 2.25):
        with warnings_kept(is_main=True):
            begin_warnings(tmp_path)
            logger.warning(f"[plan] a step took {seconds} s")
    assert read_warnings(tmp_path) == [("plan", "a step took 2.25 s")]


@pytest.mark.parametrize(
    ("right", "wrong", "ties", "names"),
    [
        (97, 3, 0, []),
        (128, 172, 0, ["[worse_than_chance]"]),
        (6, 4, 0, ["[not_better_than_chance]"]),
        (90, 5, 5, ["[equal_rewards]"]),
    ],
)
def test_what_an_evaluation_warns_of(right: int, wrong: int, ties: int, names: list[str]) -> None:
    found = list(evaluation_warnings(evaluation(right, wrong, ties)))
    assert [text.split()[0] for text in found] == names


def test_the_page_begins_with_them(tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_text("run_name: x\n")
    with warnings_kept(is_main=True):
        begin_warnings(tmp_path)
        logger.warning("[worse_than_chance] held-out accuracy is 0.4267 <b>")
    page = build_run_page(RunRecords(tmp_path)).html()
    assert page.index("held-out accuracy is 0.4267 &lt;b&gt;") < page.index("<h2>Learning</h2>")
