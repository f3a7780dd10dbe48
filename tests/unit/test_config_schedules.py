"""Arguments of schedules and optimizers: checked before anything is loaded; what is accepted runs in transformers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler, trainer_optimizer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

from rm_scale.config_names import OPTIMIZERS, SCHEDULES
from rm_scale.config_parsing import config_from_dict, parse_config
from rm_scale.config_schedules import (
    OPTIMIZER_ARGUMENTS,
    SCHEDULE_ARGUMENTS,
    Words,
    optimizer_problems,
    rate_problems,
    read_optim_args,
    schedule_problems,
)

BASE: dict[str, Any] = {"model_name_or_path": "m", "dataset_path": ["d.jsonl"]}
GIVEN_BY_TRANSFORMERS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}

# Every argument of every schedule at least once.
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in ("linear", "constant", "constant_with_warmup", "cosine", "polynomial", "inverse_sqrt")],
    ("cosine", {"num_cycles": 0.25}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"lr_end": 1e-6, "power": 2.0}),
    ("inverse_sqrt", {"timescale": 5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.5}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "num_cycles": 0.5, "warmup_lr_rate": 0.01}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 5}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 5, "warmup_type": "cosine", "decay_type": "1-sqrt", "min_lr_ratio": 0.1, "num_cycles": 0.5},
    ),
    ("warmup_stable_decay", {"num_decay_steps": 5, "num_stable_steps": 13, "decay_type": "linear"}),
    ("reduce_lr_on_plateau", {}),
    (
        "reduce_lr_on_plateau",
        {
            "factor": 0.5,
            "patience": 2,
            "threshold": 1e-3,
            "threshold_mode": "abs",
            "cooldown": 1,
            "min_lr": 1e-7,
            "eps": 0.0,
        },
    ),
    ("greedy", {"min_lr": 1e-7, "max_lr": 1e-3}),
    (
        "greedy",
        {
            "factor": 0.5,
            "patience": 2,
            "threshold": 1e-3,
            "threshold_mode": "rel",
            "cooldown": 1,
            "warmup": 1,
            "min_lr": 1e-7,
            "eps": 0,
            "smooth": True,
            "window_size": 5,
            "reset_start": 7,
        },
    ),
]


def test_arguments_are_those_of_the_functions() -> None:
    assert set(SCHEDULE_ARGUMENTS) == set(SCHEDULES)
    functions = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    functions |= {"greedy": GreedyLR, "reduce_lr_on_plateau": torch.optim.lr_scheduler.ReduceLROnPlateau}
    for name, function in functions.items():
        theirs = set(inspect.signature(function).parameters) - GIVEN_BY_TRANSFORMERS - {"mode", "verbose"}
        assert set(SCHEDULE_ARGUMENTS[name]) == theirs, name


def test_every_argument_has_an_accepted_case() -> None:
    tried = {(name, argument) for name, given in ACCEPTED for argument in given}
    assert tried == {(name, argument) for name, known in SCHEDULE_ARGUMENTS.items() for argument in known}
    assert {name for name, _ in ACCEPTED} == set(SCHEDULES)


@pytest.mark.parametrize(("name", "given"), ACCEPTED)
def test_what_is_accepted_runs(name: str, given: dict[str, Any]) -> None:
    """20 steps of the schedule that transformers makes: never above the learning rate where steps alone decide."""
    assert schedule_problems(name, given) == []
    assert rate_problems(name, given, 1e-4, 20, 2) == []
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-4)
    schedule = get_scheduler(name, optimizer, 2, 20, given or None)
    by_loss = name in {"reduce_lr_on_plateau", "greedy"}
    rates = []
    for step in range(20):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(*([1.0 + step] if by_loss else []))
    assert all(0 <= rate <= 1e-4 * (1 + 1e-9) for rate in rates)
    assert max(rates) > 5e-5


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_whose_arguments_are_missing_is_refused_with_ones_that_run(name: str) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-4)
    problems = schedule_problems(name, None) or rate_problems(name, None, 1e-4, 200, 2)
    try:
        get_scheduler(name, optimizer, 2, 200)
    except (TypeError, ValueError):
        assert problems
    for problem in problems:
        found = re.search(r"lr_scheduler_kwargs: \{(\w+): ([\d.e-]+)\}", problem)
        assert found is not None
        fixed = {found[1]: float(found[2]) if "." in found[2] or "e" in found[2] else int(found[2])}
        assert schedule_problems(name, fixed) == rate_problems(name, fixed, 1e-4, 200, 2) == []
        get_scheduler(name, optimizer, 2, 200, fixed)


@pytest.mark.parametrize(
    ("name", "given", "part"),
    [
        ("linear", {"min_lr": 0.1}, "lr_scheduler_type=linear does not take min_lr. Fix: it takes none"),
        ("cosine", {"num_cycle": 1}, "does not take num_cycle. Fix: did you mean num_cycles?"),
        ("cosine", {"num_cycles": "many"}, "num_cycles='many' must be a number above 0. Fix: "),
        ("cosine_with_restarts", {"num_cycles": 0.5}, "must be a whole number of at least 1"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "got both min_lr and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr_rate": 1.5}, "must be a number of at least 0 and at most 1"),
        ("cosine_with_min_lr", {"min_lr_rate": float("nan")}, "min_lr_rate=nan must be"),
        ("warmup_stable_decay", {}, "needs num_decay_steps in lr_scheduler_kwargs, got none"),
        ("warmup_stable_decay", {"num_decay_steps": True}, "num_decay_steps=True must be a whole number"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "exp"}, "must be one of linear, cosine, 1-sqrt"),
        ("greedy", {"smooth": 1}, "smooth=1 must be one of true, false"),
        ("reduce_lr_on_plateau", {"mode": "max"}, "does not take mode"),
    ],
)
def test_wrong_arguments_of_a_schedule(name: str, given: dict[str, Any], part: str) -> None:
    settings = {"lr_scheduler_type": name, "lr_scheduler_kwargs": given, "eval_split_size": 5, "eval_strategy": "epoch"}
    (problem,) = config_from_dict({**BASE, **settings}).problems
    assert part in problem
    assert ". Fix: " in problem


@pytest.mark.parametrize(
    ("name", "given", "steps", "part"),
    [
        ("greedy", {}, None, "min_lr=0.001, transformers' default, is not below learning_rate=0.0001"),
        ("greedy", {"min_lr": 0, "max_lr": 1e-5}, None, "max_lr=1e-05 is below learning_rate=0.0001"),
        ("cosine_with_min_lr", {"min_lr": 1e-3}, None, "min_lr=0.001, is not below"),
        ("polynomial", {"lr_end": 1e-4}, None, "lr_end=0.0001, is not below"),
        ("warmup_stable_decay", {"num_decay_steps": 19}, 20, "more than the run's 20. Fix: num_decay_steps of 18 or"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "num_stable_steps": 5}, 20, "don't add up to the run's 20"),
    ],
)
def test_arguments_that_do_not_fit_the_run(name: str, given: dict[str, Any], steps: int | None, part: str) -> None:
    (problem,) = rate_problems(name, given, 1e-4, steps, 2)
    assert part in problem
    assert ". Fix: " in problem


def test_arguments_come_from_yaml_and_as_json_from_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: m\ndataset_path: d.jsonl\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 1e-7}\n"
    )
    found = parse_config(["--config", str(file)])
    assert (found.problems, found.config.lr_scheduler_kwargs) == ((), {"min_lr": 1e-7})
    found = parse_config(["--config", str(file), "--lr_scheduler_kwargs", '{"min_lr_rate": "1e-2"}'])
    assert (found.problems, found.config.lr_scheduler_kwargs) == ((), {"min_lr_rate": 0.01})
    (problem,) = parse_config(["--config", str(file), "--lr_scheduler_kwargs", "{'min_lr': "]).problems
    assert "lr_scheduler_kwargs=" in problem
    assert "must be a valid dictionary" in problem


# --- Optimizers ------------------------------------------------------------------------------------------------------


def test_optimizer_arguments_are_read_by_transformers() -> None:
    assert set(OPTIMIZER_ARGUMENTS) <= set(OPTIMIZERS)
    for name, known in OPTIMIZER_ARGUMENTS.items():
        source = inspect.getsource(trainer_optimizer._OPTIMIZER_HANDLERS[name])
        assert [argument for argument in known if f'"{argument}"' not in source] == [], name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sgd", "momentum=0.9,nesterov=true"),
        ("sgd", "momentum = 0.9, dampening=0.1"),
        ("adagrad", "lr_decay=0.1,eps=1e-9"),
        ("rmsprop", "momentum=0.9,alpha=0.95,eps=1e-7,centered=True"),
    ],
)
def test_accepted_arguments_reach_torchs_optimizer(name: str, text: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    assert optimizer_problems(name, text) == []
    arguments = TrainingArguments(str(tmp_path), optim=name, optim_args=text, use_cpu=True)
    kind, made = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind([torch.nn.Parameter(torch.ones(1))], **made)
    assert {key: optimizer.defaults[key] for key in read_optim_args(text)} == read_optim_args(text)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("adamw_torch", "betas=0.9", "optim=adamw_torch does not take betas. Fix: it takes none"),
        ("sgd", "momentun=0.9", "did you mean momentum?"),
        ("sgd", "momentum=fast", "momentum='fast' must be a number of at least 0 and at most 1"),
        ("sgd", "momentum", "'momentum' in it is not one name=value"),
        ("sgd", "momentum=0.9,momentum=0.8", "'momentum=0.8' in it is not one name=value"),
        ("sgd", "nesterov=true", "nesterov needs a momentum, and no dampening"),
        ("sgd", "weight_decay=0.1", "does not take weight_decay"),
        ("rmsprop_bnb", "momentum=0.9", "it takes none"),
    ],
)
def test_wrong_arguments_of_an_optimizer(name: str, text: str, part: str) -> None:
    (problem,) = config_from_dict({**BASE, "optim": name, "optim_args": text}).problems
    assert part in problem
    assert ". Fix: " in problem


def test_kinds_say_what_they_take() -> None:
    switch = Words((True, False))
    assert switch.takes(True)
    assert not switch.takes(1)
    assert str(switch) == "one of true, false"
