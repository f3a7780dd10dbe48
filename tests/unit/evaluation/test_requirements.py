"""Requirements: read strictly, found by name, judged."""

from __future__ import annotations

import pytest

from rm_scale.errors import ConfigError
from rm_scale.evaluation.evaluate import metric_names
from rm_scale.evaluation.requirements import Wanted, check_names, gate_text, judge, metrics_of, read_requirements


def test_reading_requirements() -> None:
    read = read_requirements([" accuracy >= 0.8, ece<=1e-1", "subsets.a, b.accuracy>.5", "num_ties==0"])
    assert [(one.metric, one.operator, one.bound) for one in read] == [
        ("accuracy", ">=", 0.8),
        ("ece", "<=", 0.1),
        ("subsets.a, b.accuracy", ">", 0.5),
        ("num_ties", "==", 0.0),
    ]
    assert read[0].text == "accuracy>=0.8"


@pytest.mark.parametrize(
    "text", ["accuracy", "accuracy>=", "accuracy>=high", ">=0.8", "accuracy=0.8", "ece<=nan", "a>=1,"]
)
def test_what_is_no_requirement_is_refused(text: str) -> None:
    if text == "a>=1,":
        assert len(read_requirements([text])) == 1, "a comma at the end does no harm"
        return
    with pytest.raises(ConfigError, match="is not of the form METRIC>=NUMBER"):
        read_requirements([text])


def test_a_text_without_end_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as met:
        read_requirements(["a" * 100_000])
    assert len(str(met.value)) < 1000
    with pytest.raises(ConfigError) as met:
        check_names([Wanted("b" * 100_000 + ">=1", "b" * 100_000, ">=", 1.0)], ["accuracy"])
    assert len(str(met.value)) < 1000


def test_all_problems_are_said_at_once_and_an_empty_text_is_one() -> None:
    with pytest.raises(ConfigError, match=r"\(2 problems\)"):
        read_requirements(["accuracy", "ece"])
    with pytest.raises(ConfigError, match="--require '': is empty"):
        read_requirements([""])
    assert read_requirements([]) == []


RESULTS = {
    "accuracy": 0.75,
    "accuracy_ci95": [0.7, 0.8],
    "accuracy_ci95_prompts": None,
    "name": "x",
    "calibration": {"ece": 0.1, "bins": [{"low": 0.5}], "temperature": None},
    "subsets": {"code.v2": {"accuracy": 0.5, "calibration": {"ece": 0.2}}, "ties": {"accuracy": 0.25}},
}


def test_numbers_have_dotted_and_short_names() -> None:
    metrics = metrics_of(RESULTS)
    assert metrics["accuracy"] == 0.75
    assert (metrics["accuracy_ci95.low"], metrics["accuracy_ci95.high"]) == (0.7, 0.8)
    assert metrics["accuracy_ci95_prompts.low"] is None
    assert metrics["calibration.ece"] == metrics["ece"] == 0.1
    assert metrics["temperature"] is None
    assert metrics["subsets.code.v2.calibration.ece"] == metrics["subsets.code.v2.ece"] == 0.2
    assert metrics["subsets.ties.accuracy"] == 0.25, "a subset may be called like a part"
    assert not [name for name in metrics if "bins" in name or name == "name"]


def test_judging() -> None:
    wanted = read_requirements(["accuracy>=0.75,accuracy>0.75,ece<0.2,temperature<=9"])
    gate = judge(wanted, metrics_of(RESULTS))
    assert [one["passed"] for one in gate["requirements"]] == [True, False, True, False]
    assert gate["passed"] is False
    text = gate_text(gate)
    assert "passed  accuracy>=0.75: it is 0.75" in text
    assert "FAILED  temperature<=9: it does not exist here" in text
    assert text.endswith("gate: FAILED, 2 of 4 requirements")
    assert gate_text(judge(wanted[:1], metrics_of(RESULTS))).endswith("gate: passed, 1 of 1 hold")


def test_unknown_metrics_are_answered_with_the_nearest() -> None:
    names = metric_names(["new", "old"], ["arithmetic"], ["a.jsonl"])
    for known in (
        "accuracy",
        "accuracy_ci95.low",
        "ece",
        "ece_after",
        "calibration.temperature",
        "longer_wins",
        "balanced_accuracy",
        "slope_ci95.high",
        "better_longer.accuracy",
        "num_label_ties",
        "subsets.arithmetic.accuracy",
        "subsets.arithmetic.ece",
        "sources.a.jsonl.accuracy",
        "comparison.accuracy_difference",
        "comparison.old.p_value",
        "margins.quantiles.p05",
    ):
        assert known in names
    with pytest.raises(ConfigError, match=r"there is no metric 'acuracy' here. Fix: did you mean accuracy"):
        check_names([Wanted("acuracy>=1", "acuracy", ">=", 1)], names)
    with pytest.raises(ConfigError, match=r"did you mean subsets.arithmetic.accuracy"):
        check_names([Wanted("x", "subsets.arithmetics.accuracy", ">=", 1)], names)
    with pytest.raises(ConfigError, match=r"see docs/evaluation.md"):
        check_names([Wanted("x", "q", ">=", 1)], names)
    check_names([Wanted("x", "subsets.unread.accuracy", ">=", 1)], names, ["subsets."])
