"""Every learning-rate schedule that settings may name runs; those that follow the loss keep the best by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from rm_scale.config_names import SCHEDULES, SCHEDULES_BY_LOSS, SCHEDULES_WITH_ARGUMENTS
from rm_scale.config_parsing import config_from_dict
from rm_scale.planning.plan import make_plan
from rm_scale.training.arguments import training_arguments
from tests.support.launching import read_lines
from tests.support.tiny_runs import train_tiny


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in SCHEDULES_WITH_ARGUMENTS])
def test_transformers_makes_it_from_our_arguments(
    name: str, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    values = {"model_name_or_path": str(tiny_model), "dataset_path": str(pairs_file), "bf16": False}
    values |= {"output_dir": str(tmp_path / "out"), "lr_scheduler_type": name, "eval_split_size": 12}
    parsed = config_from_dict({**values, "eval_strategy": "epoch"})
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
