"""Every learning-rate schedule that settings may name runs; those that follow the loss keep the best by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from rm_scale import train
from rm_scale.config_names import SCHEDULES, SCHEDULES_BY_LOSS
from rm_scale.config_parsing import config_from_dict
from rm_scale.planning.plan import make_plan
from rm_scale.training.arguments import training_arguments
from tests.support.launching import read_lines
from tests.support.tiny_runs import train_tiny

ARGUMENTS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5},
    "greedy": {"min_lr": 1e-7},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_transformers_makes_it_from_our_arguments(
    name: str, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    values = {"model_name_or_path": str(tiny_model), "dataset_path": str(pairs_file), "bf16": False}
    values |= {"output_dir": str(tmp_path / "out"), "lr_scheduler_type": name, "eval_split_size": 12}
    parsed = config_from_dict({**values, "eval_strategy": "epoch", "lr_scheduler_kwargs": ARGUMENTS.get(name)})
    plan = replace(make_plan(parsed, 1, "cpu"), total_steps=10)
    made = training_arguments(parsed.config, plan)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=made.learning_rate)
    get_scheduler(made.lr_scheduler_type, optimizer, made.get_warmup_steps(10), 10, made.lr_scheduler_kwargs)


@pytest.mark.parametrize("name", SCHEDULES_BY_LOSS)
def test_a_schedule_that_follows_the_loss_keeps_the_checkpoint_with_the_lowest(
    name: str, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    words = ["--lr_scheduler_type", name, "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps"]
    out = train_tiny(tiny_model, pairs_file, tmp_path / "run", *words, "--save_steps", "2")
    state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
    losses = [line["eval_loss"] for line in read_lines(out / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert len(losses) >= 3
    assert state["best_metric"] == pytest.approx(min(losses[:3]))


def test_a_run_reaches_the_lowest_rate_of_its_schedule_with_an_optimizers_arguments(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    words = ["--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "2"]
    words += ["--lr_scheduler_kwargs", '{"num_decay_steps": 2, "min_lr_ratio": 0.5}', "--logging_steps", "1"]
    words += ["--optim", "sgd", "--optim_args", "momentum=0.9,nesterov=true"]
    out = train_tiny(tiny_model, pairs_file, tmp_path / "run", *words)
    rates = [line["learning_rate"] for line in read_lines(out / "run" / "metrics.jsonl") if "learning_rate" in line]
    # Steps 0 to 5: two of warm-up from the lowest, two at 5e-3, and two on the way down.
    assert rates == pytest.approx([0.0025, 0.00375, 5e-3, 5e-3, 5e-3, 0.00375], rel=1e-6)


def test_the_dry_run_refuses_a_schedule_that_does_not_fit_the_run(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--max_steps", "6"]
    words += ["--output_dir", str(tmp_path / "out"), "--lr_scheduler_type", "warmup_stable_decay", "--dry_run"]
    assert train.main([*words, "--lr_scheduler_kwargs", '{"num_decay_steps": 20}']) == 2
    assert "are more than the run's 6. Fix: num_decay_steps of 6 or less." in capsys.readouterr().err
    assert train.main(words) == 2
    assert "needs num_decay_steps in lr_scheduler_kwargs, got none" in capsys.readouterr().err
