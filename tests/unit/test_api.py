"""Training from Python: real runs in this process, the same strict settings, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rm_scale
from rm_scale import RemoteScorer, RewardScorer, TrainingResult, reward_function, train_reward_model
from rm_scale.errors import ConfigError, DataError, UserError
from tests.support.launching import read_json

pytestmark = pytest.mark.timeout(1800)


def settings(model: Path, pairs: Path, output: Path, **more: Any) -> dict[str, Any]:
    few = {"max_steps": 3, "per_device_train_batch_size": 4, "bf16": False, "sample_scores": 0, "disable_tqdm": True}
    return {"model_name_or_path": model, "dataset_path": [pairs], "output_dir": output, **few, **more}


def leaves_nothing(before: dict[str, str]) -> bool:
    return dict(os.environ) == before and not torch.distributed.is_initialized()


def test_two_runs_in_one_process(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """The second is the first again, bit for bit: nothing of a run leaks into the next."""
    before = dict(os.environ)
    first = train_reward_model(**settings(tiny_model, pairs_file, tmp_path / "one", eval_split_size=12))
    assert leaves_nothing(before)
    second = train_reward_model(**settings(tiny_model, pairs_file, tmp_path / "two", eval_split_size=12))
    assert leaves_nothing(before)
    assert first.finished and first.output_dir == tmp_path / "one"
    assert first.evaluation == read_json(tmp_path / "one" / "run" / "evaluation.json")
    assert first.accuracy == first.evaluation["accuracy"] and first.evaluation["num_pairs"] == 12
    assert second.evaluation == first.evaluation
    scores = [RewardScorer.from_pretrained(run.output_dir).score(["2 + 2 ="], [" 4"]) for run in (first, second)]
    assert scores[0] == scores[1]


def test_no_evaluation_data_no_numbers(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    result = train_reward_model(**settings(tiny_model, pairs_file, tmp_path / "run", max_steps=1))
    assert result == TrainingResult(tmp_path / "run", finished=True, evaluation={}) and result.accuracy is None


@pytest.mark.long
def test_zero_3_then_none(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Its process group, its sharded loading and its engine go with it: the next run knows nothing of them."""
    before = dict(os.environ)
    for number, stage in enumerate(("zero3", None, "zero2")):
        more = {"deepspeed": stage, "max_steps": 1, "eval_split_size": 12}
        result = train_reward_model(**settings(tiny_model, pairs_file, tmp_path / str(number), **more))
        assert result.finished and result.evaluation["num_pairs"] == 12
        assert leaves_nothing(before)


def test_all_wrong_settings_are_told_at_once(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    wrong = settings(tiny_model, pairs_file, tmp_path / "run", learning_rat=1.0, lora_r=0, max_steps="many")
    with pytest.raises(ConfigError) as caught:
        train_reward_model(**wrong)
    assert len(caught.value.problems) == 3
    for part in ("learning_rat", "did you mean learning_rate", "lora_r=0", "max_steps='many'"):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_errors_are_raised_and_leave_nothing(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    before = dict(os.environ)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "chosen": "b", "rejected": ""}\n' * 10)
    with pytest.raises(DataError, match="rejected"):
        train_reward_model(**settings(tiny_model, broken, tmp_path / "run", deepspeed="zero2"))
    assert leaves_nothing(before)
    assert train_reward_model(**settings(tiny_model, pairs_file, tmp_path / "run", max_steps=1)).finished


def test_a_logger_that_is_not_installed_names_its_extra(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    with pytest.raises(ConfigError, match=r"requires tensorboard to be installed.* 'rm-scale\[tensorboard\]'"):
        train_reward_model(**settings(tiny_model, pairs_file, tmp_path / "run", report_to="tensorboard"))
    assert not (tmp_path / "run").exists()


def test_a_stop_is_a_result(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop it says so; the same call goes on from the checkpoint and finishes."""
    asked = settings(tiny_model, pairs_file, tmp_path / "run", eval_split_size=12, resume_from_checkpoint="auto")
    asked |= {"save_strategy": "steps", "save_steps": 1, "global_batch_size": 4}
    with monkeypatch.context() as patch:
        patch.setenv("RM_SCALE_END_TIME", "1000")
        stopped = train_reward_model(**asked)
    assert not stopped.finished and stopped.evaluation == {}
    assert train_reward_model(**asked).finished


def test_dry_run_writes_nothing(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_reward_model(**settings(tiny_model, pairs_file, tmp_path / "run", dry_run=True))
    assert not result.finished and not (tmp_path / "run").exists()
    assert "global_batch_size" in capsys.readouterr().out


def test_a_rank_of_several_is_refused(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="rank 1 of 2: it trains in one process"):
        train_reward_model(**settings(tiny_model, pairs_file, tmp_path / "run"))


def test_a_process_with_a_group_is_refused(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"has a torch\.distributed process group"):
            train_reward_model(**settings(tiny_model, pairs_file, tmp_path / "run"))
        assert torch.distributed.is_initialized(), "it is not ours to take down"
    finally:
        torch.distributed.destroy_process_group()


def test_names_are_loaded_when_asked_for() -> None:
    """One line each, and the package itself stays free of torch; an unknown name is an AttributeError."""
    assert {train_reward_model, RewardScorer, RemoteScorer, reward_function} <= {
        getattr(rm_scale, name) for name in rm_scale.__all__
    }
    assert set(rm_scale.__all__) <= set(dir(rm_scale))
    with pytest.raises(AttributeError, match="no attribute 'train_reward'"):
        rm_scale.train_reward  # noqa: B018
    code = "import sys; from rm_scale import train_reward_model, RemoteScorer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_tells_its_types() -> None:
    assert (Path(rm_scale.__file__).parent / "py.typed").is_file()
