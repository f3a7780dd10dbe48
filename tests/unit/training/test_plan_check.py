"""A run's figures beside the plan's: what is compared, recorded and warned about."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from rm_scale.planning.estimate import Estimate, estimate
from rm_scale.planning.hardware import known_devices
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.shape import shape_from_config
from rm_scale.tiers import model_tier
from rm_scale.training.plan_check import FIRST_STEPS, Measured, PlanCheck, Term, comparison, memory_terms, time_terms
from rm_scale.training.step_timing import memory_at_rest
from tests.support.row_loads import uniform_rows


def predicted() -> Estimate:
    shape = shape_from_config(model_tier("1b").config)
    load = uniform_rows(8, 400, 100, "prefix_shared")
    return estimate(Scenario(shape, known_devices()["h100-80g"], 2, load, num_micro_steps=4))


def test_figures_that_agree_are_recorded_without_a_warning() -> None:
    plan = predicted()
    record = comparison(
        plan, Measured(int(plan.peak_memory_bytes * 1.1), [plan.time.low, plan.time.high]), knows_speed=True
    )
    assert record["warnings"] == []
    assert record["predicted"]["peak_memory_bytes"] == plan.peak_memory_bytes
    assert record["measured"]["peak_memory_bytes"] == int(plan.peak_memory_bytes * 1.1)
    assert plan.time.low <= record["measured"]["step_seconds"] <= plan.time.high


def test_deviations_name_the_likely_term() -> None:
    plan = predicted()
    record = comparison(plan, Measured(2 * plan.peak_memory_bytes, [plan.time.high * 1.5]), knows_speed=True)
    memory, step = record["warnings"]
    assert "100% more than" in memory and "most likely wrong: " in memory
    assert "50% more than" in step and "of h100-80g" in step
    slow = replace(plan, time=replace(plan.time, communication=plan.time.compute * 3))
    (step,) = comparison(slow, Measured(slow.peak_memory_bytes, [slow.time.high * 2]), knows_speed=True)["warnings"]
    assert "node_bandwidth" in step


def test_a_small_model_whose_libraries_take_less_than_planned_is_no_warning() -> None:
    plan = predicted()
    small = replace(plan, peak_memory_bytes=900_000_000)
    assert comparison(small, Measured(500_000_000), knows_speed=False)["warnings"] == []
    assert comparison(small, Measured(1_500_000_000), knows_speed=False)["warnings"] != []


def test_unknown_devices_are_not_judged_by_time() -> None:
    plan = predicted()
    record = comparison(plan, Measured(plan.peak_memory_bytes, [1e9]), knows_speed=False)
    assert record["warnings"] == [] and record["predicted"]["step_seconds"] is None


def on_a_processor() -> Estimate:
    shape = shape_from_config(model_tier("1b").config)
    load = uniform_rows(4, 300, 100, "prefix_shared")
    return estimate(Scenario(shape, known_devices()["cpu"], 1, load, method="lora", zero_stage=None, precision="amp"))


def named(terms: list[Term]) -> dict[str, Term]:
    return {term.name.split()[0]: term for term in terms}


def test_memory_is_told_apart_by_what_lasts_between_two_steps() -> None:
    plan = predicted()  # ZeRO-3 keeps its gradients
    lasting = sum(plan.memory[name] for name in ("weights", "gradients", "optimizer"))
    passing = sum(size for name, size in plan.memory.items() if name not in ("weights", "optimizer", "gradients"))
    passing -= plan.memory["framework"]
    at_rest = {"in_use_bytes": lasting, "free_blocks_bytes": None}
    terms = named(memory_terms(plan, Measured(lasting + passing, at_rest=at_rest)))
    assert terms["model"].difference == terms["what"].difference == 0
    assert memory_terms(plan, Measured(lasting)) == [], "nobody looked at what lasts"


def test_the_term_that_was_off_is_named() -> None:
    plan = on_a_processor()
    states = plan.memory["weights"] + plan.memory["optimizer"]
    steps = sum(plan.memory[name] for name in ("activations", "gradients", "held_blocks"))
    process = plan.memory["framework"]
    for name, (held, free, more) in {
        "model states": (states + 10**10, steps, 0),
        "what steps need": (states, steps + 10**10, 0),
        "the process": (states, steps, 10**10),
    }.items():
        at_rest = {"in_use_bytes": held, "free_blocks_bytes": free}
        record = comparison(plan, Measured(held + free + process + more, at_rest=at_rest), knows_speed=False)
        (warning,) = record["warnings"]
        assert f"most of it is {name}" in warning
        assert record["terms"]["memory_bytes"][0]["name"].startswith(name)


def test_a_term_that_was_off_the_other_way_is_not_blamed() -> None:
    plan = on_a_processor()
    states = plan.memory["weights"] + plan.memory["optimizer"]
    at_rest = {"in_use_bytes": states // 2, "free_blocks_bytes": 3 * plan.peak_memory_bytes}
    record = comparison(plan, Measured(4 * plan.peak_memory_bytes, at_rest=at_rest), knows_speed=False)
    assert "what steps need" in record["warnings"][0]


def test_slow_steps_name_what_took_the_time() -> None:
    plan = predicted()
    plan = replace(plan, time=replace(plan.time, communication=plan.time.compute / 2, num_micro_steps=1))
    computing = plan.time.compute + plan.time.update
    slow_network = Measured(1, [computing + 9 * plan.time.compute], waits=[(0.0, 9 * plan.time.compute)])
    (step,) = comparison(plan, replace(slow_network, peak=plan.peak_memory_bytes), knows_speed=True)["warnings"]
    assert "communication took" in step and "node_bandwidth" in step
    slow_chip = Measured(plan.peak_memory_bytes, [9 * computing], waits=[(0.0, plan.time.communication)])
    (step,) = comparison(plan, slow_chip, knows_speed=True)["warnings"]
    assert "computing and the update took" in step and "step_efficiency" in step
    unknown = Measured(plan.peak_memory_bytes, [9 * computing], waits=[(0.0, None)])
    assert time_terms(plan, unknown) == [], "NCCL's waiting can't be timed from the host"


def test_waiting_for_data_is_named() -> None:
    plan = predicted()
    measured = Measured(plan.peak_memory_bytes, [plan.time.low], waits=[(plan.time.low, 0.0)])
    (warning,) = comparison(plan, measured, knows_speed=False)["warnings"]
    assert "for its data" in warning


def test_memory_at_rest_knows_what_is_in_use() -> None:
    before = memory_at_rest()
    held = torch.ones(50_000_000)
    after = memory_at_rest()
    assert before["in_use_bytes"] is not None and after["in_use_bytes"] is not None
    assert 190e6 < after["in_use_bytes"] - before["in_use_bytes"] < 250e6 and held.numel()


def test_a_run_warns_after_its_first_steps_and_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Alone, since an earlier test may have left a handler through which a line would be seen twice.
    monkeypatch.setattr(logging.getLogger("rm_scale"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", False)
    plan = replace(on_a_processor(), peak_memory_bytes=10**9)
    check = PlanCheck(plan, tmp_path / "plan_check.json", knows_speed=False)
    args, state, control = TrainingArguments(str(tmp_path), report_to=[]), TrainerState(), TrainerControl()
    logs = {"peak_memory_bytes": 5 * 10**9}
    for step in range(1, FIRST_STEPS + 3):
        check.on_step_begin(args, state, control)
        check.on_step_end(args, state, control)
        check.on_log(args, state, control, logs=logs)
        assert caplog.text.count("peak memory was 5.00 GB") == (step >= FIRST_STEPS)
    check.on_train_end(args, state, control)
    assert caplog.text.count("peak memory was 5.00 GB") == 1
    record = json.loads((tmp_path / "plan_check.json").read_text())
    assert record["terms"]["memory_bytes"] and len(record["warnings"]) == 1


def test_a_real_run_records_its_terms(full_run: Path) -> None:
    record = json.loads((full_run / "run" / "plan_check.json").read_text())
    terms = {term["name"].split()[0]: term for term in record["terms"]["memory_bytes"]}
    assert set(terms) == {"model", "what", "the"}
    assert 0 < terms["model"]["measured"] < record["measured"]["peak_memory_bytes"]
    assert record["measured"]["data_wait_seconds"] >= 0
