"""A save whose scores differ after the reload: kept under another name once, and the run goes on; then it ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rm_scale.errors import ModelError
from rm_scale.modeling.loading import _require_one_device
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.train import main
from rm_scale.training.checkpoint import reload_check
from rm_scale.training.checkpoint.publish import keep_one_unverified
from rm_scale.training.trainer import RewardTrainer

MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, which it keeps from the root logger."""
    package = logging.getLogger("rm_scale")
    package.addHandler(caplog.handler)
    package.setLevel(logging.INFO)
    yield caplog
    package.removeHandler(caplog.handler)


def settings(model: Path, pairs: Path, output: Path) -> list[str]:
    words = ["--model_name_or_path", str(model), "--dataset_path", str(pairs), "--output_dir", str(output)]
    words += ["--bf16", "false", "--eval_split_size", "8", "--max_steps", "6", "--disable_tqdm", "--sample_scores", "0"]
    return [*words, "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "5e-3"]


def checkpoints_of(output: Path) -> list[str]:
    """Names of all that were published."""
    return sorted(path.name for path in output.iterdir() if "checkpoint-" in path.name and path.name[0] != ".")


def damage_saves(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Alter a matrix in the file as soon as it is written: what a wrong kernel or a wrong shard would leave."""
    plain = RewardTrainer._save

    def save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        plain(self, output_dir, state_dict)
        if self.state.global_step in steps and ".tmp-checkpoint" in str(output_dir):
            file = Path(str(output_dir)) / "model.safetensors"
            save_file({**load_file(file), MATRIX: load_file(file)[MATRIX] * 20}, file, metadata={"format": "pt"})

    monkeypatch.setattr(RewardTrainer, "_save", save)


def test_the_first_one_is_kept_aside_and_the_run_goes_on(
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    damage_saves(monkeypatch, {4})
    assert main(settings(tiny_model, pairs_file, out)) == 0
    assert checkpoints_of(out) == [
        "checkpoint-2",
        "checkpoint-6",
        "unverified-checkpoint-4",
    ]
    said = "".join(capfd.readouterr())
    assert "the saved model scores differently from the one in training" in said
    assert "kept as unverified-checkpoint-4" in said
    attempts = [json.loads(line) for line in (out / "run" / "attempts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in attempts if line["event"] == "saved"] == [2, 6], "it is no progress to resume from"

    again = tmp_path / "again"
    words = settings(tiny_model, pairs_file, again)
    assert main([*words, "--resume_from_checkpoint", str(out / "unverified-checkpoint-4")]) == 0
    losses = [json.loads(line).get("loss") for line in (again / "run" / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line).get("loss") for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [loss for loss in losses if loss] == [loss for loss in whole if loss][4:], "optimizer state is what counts"


def test_the_second_one_ends_the_run(
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    damage_saves(monkeypatch, {2, 4})
    assert main(settings(tiny_model, pairs_file, out)) == 2
    assert "scores differently from the one in training" in capsys.readouterr().err
    assert checkpoints_of(out) == ["unverified-checkpoint-2"]


def test_at_a_stop_it_is_kept_and_named_and_no_requeue_is_asked_for(
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 85 would start the run again from an older checkpoint, and the steps since would be lost unsaid."""
    out = tmp_path / "out"
    damage_saves(monkeypatch, {3})
    step = RewardTrainer.training_step

    def stop_in_the_third(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            (Path(self.args.output_dir) / "STOP").touch()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RewardTrainer, "training_step", stop_in_the_third)
    assert main(settings(tiny_model, pairs_file, out)) == 2
    said = capsys.readouterr().err
    assert "asked to stop at step 3" in said and "kept as unverified-checkpoint-3" in said
    assert checkpoints_of(out) == ["checkpoint-2", "unverified-checkpoint-3"]


def test_out_of_memory_on_the_gpu_sends_the_check_to_the_cpu(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """Also where the loader meets it, and where it comes from outside torch's allocator."""
    contract = ScoringContract.load(full_run)
    head = reload_check.load_reward_model(full_run).score.effective_weight()
    plain = reload_check._scores_after_reload
    monkeypatch.setattr(reload_check, "_no_memory", lambda *_: None)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED in x")):

        def reload(*args: Any, error: Exception = error) -> list[float]:
            if args[3].type == "cuda":
                raise error
            return plain(*args)

        monkeypatch.setattr(reload_check, "_scores_after_reload", reload)
        log.clear()
        reload_check.verify_saved(full_run, contract, head, torch.device("cuda", 0), 1)
        assert "the GPU ran out of memory while it was loaded there" in log.text

    def wrong(*args: Any) -> list[float]:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(reload_check, "_scores_after_reload", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        reload_check.verify_saved(full_run, contract, head, torch.device("cuda", 0), 1)


def test_a_loader_that_runs_out_of_memory_does_not_blame_the_model(
    full_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
    with pytest.raises(torch.OutOfMemoryError):
        reload_check.load_reward_model(full_run)


def test_room_is_what_is_free_and_what_the_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * 10**9)
    device = torch.device("cuda", 0)
    assert reload_check._no_memory(device, 10 * 10**9) is None, "13 GB to load, 13 GB there"
    reason = reload_check._no_memory(device, 11 * 10**9)
    assert reason == "the model takes 14.3 GB to load and the GPU has 13 GB free"


def test_a_tensor_elsewhere_is_named(full_run: Path) -> None:
    model = reload_check.load_reward_model(full_run)
    model.register_buffer("stray", torch.zeros(1, device="meta"))
    with pytest.raises(ModelError, match=r"1 of its tensors are elsewhere, first stray on meta"):
        _require_one_device(model, torch.device("cpu", 0), full_run)


def test_one_unverified_checkpoint_is_kept(tmp_path: Path) -> None:
    for name in ("unverified-checkpoint-2", "unverified-checkpoint-4", "checkpoint-3"):
        (tmp_path / name).mkdir()
    keep_one_unverified(tmp_path / "checkpoint-3")
    assert len(list(tmp_path.iterdir())) == 3
    keep_one_unverified(tmp_path / "unverified-checkpoint-4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "unverified-checkpoint-4"]


def test_without_room_on_the_gpu_the_cpu_checks_and_other_kernels_are_allowed_for(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    contract = ScoringContract.load(full_run)
    assert contract.score_std is not None
    head = reload_check.load_reward_model(full_run).score.effective_weight()
    reason = "the model takes 26 GB to load and the GPU has 3 GB free"
    monkeypatch.setattr(reload_check, "_no_memory", lambda *_: reason)
    reload_check.verify_saved(full_run, contract, head, torch.device("cuda", 0), 26 * 10**9)
    assert "on the CPU, where scores may differ by 0.0001" in log.text and reason in log.text
