"""Leaving a source of published measurements out: what is set on the others, and what is said about it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.published import CASES, MEMORY, SPEED
from rm_scale.planning import launches, step_time
from rm_scale.planning.published.predict import read_cases
from tools import cross_validation as validation

SOURCE = "NVIDIA-NeMo/Automodel"
SMALL = {SOURCE, "pytorch/torchtitan", "pytorch/torchtune", "huggingface/peft"}


@pytest.fixture(scope="module")
def cases() -> list[validation.Case]:
    return validation.cases_of(row for row in read_cases(str(CASES)) if row["source"] in SMALL)


def test_constants_are_the_planner_s_own() -> None:
    values = {constant.name: constant.value for constant in validation.CONSTANTS}
    assert values["ZERO3_HOOKS"] == launches.ZERO3_HOOKS
    assert values["DEQUANTISE_BYTES, GPTQ"] == step_time.DEQUANTISE_BYTES["gptq"]
    assert len(values) == len(validation.CONSTANTS)
    for constant in validation.CONSTANTS:
        assert (
            constant.low <= min(constant.prior, constant.value) <= max(constant.prior, constant.value) <= constant.high
        )


def test_own_constants_give_the_planner_s_predictions_and_stay(cases: list[validation.Case]) -> None:
    own = {constant.name: constant.value for constant in validation.CONSTANTS}
    today = validation.errors_of(cases, {})
    # One value for A100, 3090 and 4090, one for A100 of either memory size: that of the first device.
    assert validation.errors_of(cases, own) == pytest.approx(today)
    with validation.constants_set({"ZERO3_HOOKS": 1.0}):
        assert launches.ZERO3_HOOKS == 1.0
    assert own["ZERO3_HOOKS"] == launches.ZERO3_HOOKS
    assert validation.errors_of(cases, {}) == today


def test_what_is_set_without_a_source_does_not_look_at_it(cases: list[validation.Case]) -> None:
    reach = validation.reach_of(cases, validation.CONSTANTS)
    values = validation.set_without(cases, reach, SOURCE)
    hidden = [replace(case, measured=case.measured * 3) if case.source == SOURCE else case for case in cases]
    assert validation.set_without(hidden, reach, SOURCE) == values
    # It does look at the others: torchtitan is the one other source that has an H100.
    others = [replace(case, measured=case.measured * 1.3) if "titan" in case.source else case for case in cases]
    name = "step_efficiency, H100"
    assert validation.set_without(others, reach, SOURCE)[name] > values[name]
    # What no row knows stays at its prior.
    priors = {constant.name: constant.prior for constant in validation.CONSTANTS}
    assert values["DEQUANTISE_BYTES, GPTQ"] == priors["DEQUANTISE_BYTES, GPTQ"]
    assert values["ZERO3_HOOKS"] == priors["ZERO3_HOOKS"]


def test_the_search_finds_constants_that_rows_were_made_with(cases: list[validation.Case]) -> None:
    constant = next(item for item in validation.CONSTANTS if item.name == "step_efficiency, H100")
    with validation.constants_set({}):
        made = [
            replace(case, measured=case.predict({constant.name: constant.tries[-4]}))
            for case in cases
            if case.what == SPEED
        ]
    reach = validation.reach_of(made, [constant])
    found = validation.Search(made, [constant], reach, range(len(made))).run()
    assert found[constant.name] == constant.tries[-4]


def test_tables_say_both_errors_by_kind(cases: list[validation.Case]) -> None:
    items = [
        validation.LeftOut(case, 0.2 if case.what == MEMORY else -0.5, 0.1) for case in cases if case.source == SOURCE
    ]
    assert [item.case.what for item in items] == [SPEED, SPEED]
    table = validation.error_table(items, "source")
    assert f"| {SOURCE} | - | - | 2, 50.0 %, -50.0 % | 2, 10.0 %, +10.0 % |" in table
    assert validation.error_table(items, "framework").splitlines()[2].startswith("| neither |")
    assert math.isclose(sum(validation.Search(cases, [], {}, range(3)).weights.values()), 1.0)
