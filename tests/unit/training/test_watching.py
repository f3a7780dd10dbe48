"""A run that looks wrong says so by name; one that is wrong stops; a save that differs is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from rm_scale.distributed import World
from rm_scale.errors import CheckpointError, TrainingError
from rm_scale.launch import steps
from rm_scale.modeling.contract import ScoringContract
from rm_scale.modeling.head import active_head
from rm_scale.training.callbacks import EarlyWarnings, MetricsFile
from rm_scale.training.checkpoints import disk_errors_explained, refuse_unsafe_pickles, verify_saved

ARGS: Any = SimpleNamespace(spec=TrainingArguments)


def log(callback: Any, **logs: Any) -> None:
    state = TrainerState()
    state.is_world_process_zero = True
    callback.on_log(ARGS, state, TrainerControl(), logs=logs)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("rm_scale").propagate = True
    caplog.set_level(logging.WARNING)
    return caplog


def test_equal_rewards_are_named_once(warnings: pytest.LogCaptureFixture) -> None:
    callback = EarlyWarnings()
    for _ in range(3):
        log(callback, loss=0.69, max_reward=0.5, min_reward=0.5)
    assert warnings.text.count("[rewards_equal] all rewards are 0.5") == 1


def test_accuracy_of_chance_is_named(warnings: pytest.LogCaptureFixture) -> None:
    callback = EarlyWarnings(window=400)
    for _ in range(4):
        log(callback, loss=0.69, accuracy=0.51, num_pairs=100)
    assert "[accuracy_stuck] accuracy over the last 400 training pairs is 0.510" in warnings.text


def test_real_log_lines_feed_the_watch(trainer_and_config: Any) -> None:
    """The meter's own names, so that the watch can't go blind when they change."""
    trainer, _ = trainer_and_config
    (batch,) = next(iter(trainer.get_train_dataloader()))["micro_batches"]
    trainer.meter.add(torch.randn(len(batch["row_group"])), batch)
    assert {"num_pairs", "accuracy", "max_reward", "min_reward"} <= trainer.meter.read().keys()


def test_learning_is_not_warned_about(warnings: pytest.LogCaptureFixture) -> None:
    callback = EarlyWarnings(window=400)
    for _ in range(8):
        log(callback, loss=0.6, accuracy=0.7, num_pairs=100, max_reward=1.0, min_reward=0.0)
    assert "[" not in warnings.text


def test_metrics_file_has_one_object_a_line(tmp_path: Path) -> None:
    callback = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    log(callback, loss=0.5, tensor=torch.tensor(2.0))
    log(callback, loss=float("nan"))
    lines = [json.loads(line) for line in callback.path.read_text().splitlines()]
    assert lines == [{"step": 0, "loss": 0.5, "tensor": 2.0}, {"step": 0, "loss": "nan"}]


@pytest.fixture(scope="module")
def trainer_and_config(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real trainer on the tiny model, in this process."""
    from rm_scale.config import config_from_dict
    from rm_scale.planning.plan import make_plan

    output = tmp_path_factory.mktemp("watching") / "run"
    values = {"model_name_or_path": str(tiny_model), "dataset_path": str(pairs_file), "output_dir": str(output)}
    values |= {"max_steps": 3, "bf16": False, "eval_split_size": 10, "disable_tqdm": True, "logging_steps": 1}
    parsed = config_from_dict(values)
    config, plan = parsed.config, make_plan(parsed, 1, "cpu")
    tokenizer, encoder = steps.load_text_encoder(config)
    data = steps.load_data(config, encoder)
    plan = steps.count_steps(plan, data, config)
    arguments = steps.build_arguments(config, plan)
    loaded = steps.load_model(config, plan, tokenizer)
    steps.open_run_directory(config, plan, data, World())
    return steps.build_trainer(config, plan, arguments, tokenizer, encoder, loaded, data), config


def test_a_save_that_differs_is_refused(trainer_and_config: Any, tmp_path: Path) -> None:
    trainer, _ = trainer_and_config
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    contract, head = ScoringContract.load(folder), trainer.head_weight()
    verify_saved(folder, contract, head)
    good = load_file(folder / "model.safetensors")

    def damage(**changes: torch.Tensor) -> None:
        save_file({**good, **changes}, folder / "model.safetensors", metadata={"format": "pt"})

    damage(**{"score.weight": torch.zeros_like(good["score.weight"])})
    with pytest.raises(CheckpointError, match="the saved reward head is not the one in training"):
        verify_saved(folder, contract, head)
    name = "model.layers.0.mlp.up_proj.weight"
    damage(**{name: good[name] * 20})
    with pytest.raises(CheckpointError, match="the saved model scores differently"):
        verify_saved(folder, contract, head)
    damage(**{name: torch.full_like(good[name], float("nan"))})
    with pytest.raises(CheckpointError, match="empty or not finite"):
        verify_saved(folder, contract, head)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights were written"):
        verify_saved(folder, contract, head)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    (tmp_path / "global_step1").mkdir()
    torch.save({"module": torch.ones(2)}, tmp_path / "global_step1" / "good.pt")
    refuse_unsafe_pickles(tmp_path)
    torch.save({"module": Evil()}, tmp_path / "global_step1" / "zz_evil.pt")
    with pytest.raises(CheckpointError, match="would run code when it is loaded"):
        refuse_unsafe_pickles(tmp_path)
    (tmp_path / "global_step1" / "zz_evil.pt").rename(tmp_path / "rng_state_0.pth")
    with pytest.raises(CheckpointError, match=r"rng_state_0\.pth: can't be read as plain tensors"):
        refuse_unsafe_pickles(tmp_path)
    (tmp_path / "rng_state_0.pth").unlink()
    (tmp_path / "global_step1").rename(tmp_path / "other")
    (tmp_path / "latest").write_text("other")
    with pytest.raises(CheckpointError, match="names 'other', not a global_stepN folder"):
        refuse_unsafe_pickles(tmp_path)
    assert not marker.exists()


def test_a_head_that_is_not_finite_never_starts(trainer_and_config: Any) -> None:
    trainer, _ = trainer_and_config
    head = active_head(trainer.model)
    before = head.weight.data.clone()
    head.weight.data = torch.full_like(before, float("inf"))
    try:
        with pytest.raises(TrainingError, match="NaN or infinite weights before the first step"):
            trainer.train()
    finally:
        head.weight.data = before


def test_a_loss_that_is_not_finite_stops_the_run(trainer_and_config: Any) -> None:
    trainer, _ = trainer_and_config
    weight = trainer.model.get_input_embeddings().weight
    before = weight.data.clone()
    weight.data = torch.full_like(before, float("nan"))
    try:
        with pytest.raises(
            TrainingError,
            match=r"step 1: the loss is not finite on 1 ranks.*Groups .*nonfinite.jsonl",
        ):
            trainer.train()
    finally:
        weight.data = before


def test_resume_without_a_checkpoint_is_explained(trainer_and_config: Any, tmp_path: Path) -> None:
    _, config = trainer_and_config
    nowhere = config.model_copy(update={"resume_from_checkpoint": "last", "output_dir": str(tmp_path / "none")})
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        steps.choose_resume(nowhere, World())


def test_a_full_disk_is_explained(trainer_and_config: Any) -> None:
    """/dev/full takes no byte: every write to it fails as on a full disk."""
    with (
        pytest.raises(CheckpointError, match=r"could not be written .*Fix: free disk space"),
        disk_errors_explained("out"),
    ):
        Path("/dev/full").write_text("x" * 100_000)
