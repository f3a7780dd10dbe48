"""A run's figures beside the plan's: what is compared, recorded and warned about."""

from __future__ import annotations

from dataclasses import replace

from rm_scale.planning.estimate import Estimate, estimate
from rm_scale.planning.hardware import known_devices
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.shape import shape_from_config
from rm_scale.tiers import model_tier
from rm_scale.training.plan_check import comparison
from tests.support.row_loads import uniform_rows


def predicted() -> Estimate:
    shape = shape_from_config(model_tier("1b").config)
    load = uniform_rows(8, 400, 100, "prefix_shared")
    return estimate(Scenario(shape, known_devices()["h100-80g"], 2, load, num_micro_steps=4))


def test_figures_that_agree_are_recorded_without_a_warning() -> None:
    plan = predicted()
    record = comparison(plan, int(plan.peak_memory_bytes * 1.1), [plan.time.low, plan.time.high], knows_speed=True)
    assert record["warnings"] == []
    assert record["predicted"]["peak_memory_bytes"] == plan.peak_memory_bytes
    assert record["measured"]["peak_memory_bytes"] == int(plan.peak_memory_bytes * 1.1)
    assert plan.time.low <= record["measured"]["step_seconds"] <= plan.time.high


def test_deviations_name_the_likely_term() -> None:
    plan = predicted()
    record = comparison(plan, 2 * plan.peak_memory_bytes, [plan.time.high * 1.5], knows_speed=True)
    memory, step = record["warnings"]
    assert "100% more than" in memory and "most likely wrong: " in memory
    assert "50% more than" in step and "of h100-80g" in step
    slow = replace(plan, time=replace(plan.time, communication=plan.time.compute * 3))
    (step,) = comparison(slow, slow.peak_memory_bytes, [slow.time.high * 2], knows_speed=True)["warnings"]
    assert "node_bandwidth" in step


def test_a_small_model_whose_libraries_take_less_than_planned_is_no_warning() -> None:
    plan = predicted()
    small = replace(plan, peak_memory_bytes=900_000_000)
    assert comparison(small, 500_000_000, [], knows_speed=False)["warnings"] == []
    assert comparison(small, 1_500_000_000, [], knows_speed=False)["warnings"] != []


def test_unknown_devices_are_not_judged_by_time() -> None:
    plan = predicted()
    record = comparison(plan, plan.peak_memory_bytes, [1e9], knows_speed=False)
    assert record["warnings"] == [] and record["predicted"]["step_seconds"] is None
