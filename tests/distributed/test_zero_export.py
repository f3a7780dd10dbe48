"""Exports of checkpoints that hold nothing but ZeRO's shards, written by real engines of two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rm_scale.cli import main
from rm_scale.errors import CheckpointError, DiskError, ModelError
from rm_scale.inference.export import zero_states
from rm_scale.inference.export.zero_states import consolidated
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.modeling.scoring_contract import ScoringContract
from tests.support.launching import REPOSITORY, deepspeed_command, run

pytestmark = pytest.mark.distributed

STEP = "global_step2"


@pytest.fixture(scope="module")
def shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`zero2` and `zero3`, and beside each what DeepSpeed itself gathered, in fp32."""
    folder = tmp_path_factory.mktemp("shards")
    script = REPOSITORY / "tests" / "support" / "shard_writer.py"
    done = run(deepspeed_command(script, str(tiny_model), str(folder)))
    assert done.code == 0, done.output[-4000:]
    return folder


@pytest.fixture
def checkpoint(shards: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(shards / "zero3", tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("stage", [2, 3])
def test_shards_become_the_masters(shards: Path, tmp_path: Path, stage: int) -> None:
    gathered = load_file(shards / f"zero{stage}.safetensors")
    for given in (shards / f"zero{stage}", shards / f"zero{stage}" / STEP):
        with consolidated(given, tmp_path / "out") as plain:
            assert plain.parent == tmp_path
            found = load_file(plain / "model.safetensors")
            assert found.keys() == gathered.keys() and all(torch.equal(found[name], gathered[name]) for name in found)
            assert not list(plain.glob("*.py")) and not list(plain.glob("*.pt"))
            contract = ScoringContract.load(plain)
        assert contract.dtype == "bfloat16" and contract.base_model.name == str(shards / f"zero{stage}")
        assert list(tmp_path.iterdir()) == [], "it is gone with the block"


def test_the_command_exports_them(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "model"
    words = ["--model", str(shards / "zero3"), "--output", str(output), "--dtype", "float32"]
    assert main(["export", *words]) == 0, capsys.readouterr().err
    assert "score the same in plain transformers" in capsys.readouterr().out
    gathered = load_file(shards / "zero3.safetensors")
    found = load_file(output / "model.safetensors")
    assert all(torch.equal(found[name], gathered[name]) for name in gathered)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(RewardScorer.from_pretrained(output, device="cpu").score(["2 + 2 ="], [" 4"])) == 1


def test_pickles_that_would_run_code_are_not_run(checkpoint: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    shard = next((checkpoint / STEP).glob("*_0_*optim_states.pt"))
    states = torch.load(shard, weights_only=False)
    torch.save({**states, "more": Trap()}, shard)
    with pytest.raises(CheckpointError, match="would run code when it is loaded"), consolidated(checkpoint, tmp_path):
        pass
    assert not (tmp_path / "ran").exists()


def test_deepspeeds_reader_is_held_to_plain_pickles(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a file changes after it was looked through."""

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    def swap(folder: Path) -> None:
        shard = next(folder.glob("*_0_*optim_states.pt"))
        torch.save({"optimizer_state_dict": Trap()}, shard)

    monkeypatch.setattr(zero_states, "refuse_unsafe_pickles", swap)
    with (
        pytest.raises(CheckpointError, match=r"shards don't make a whole model \(Weights only load failed"),
        consolidated(checkpoint, tmp_path),
    ):
        pass
    assert not (tmp_path / "ran").exists()


def test_shards_that_can_not_be_used(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text), consolidated(checkpoint, tmp_path / "out"):
            pass

    config = checkpoint / "config.json"
    kept = json.loads(config.read_text())
    config.write_text(json.dumps({**kept, "num_hidden_layers": kept["num_hidden_layers"] + 1}))
    refused(ModelError, r"9 weights are missing in the shards and 0 are not the model's")
    config.write_text(json.dumps({**kept, "model_type": "unheard_of"}))
    refused(ModelError, r"its config\.json can't be used")
    config.unlink()
    refused(ModelError, r"has ZeRO's shards but no config\.json")
    config.write_text(json.dumps(kept))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(zero_states.shutil, "disk_usage", lambda _: usage._replace(free=10))
        refused(DiskError, r"putting ZeRO's shards together needs about 0\.0 GB there for a while")
    next((checkpoint / STEP).glob("*_1_*optim_states.pt")).unlink()
    refused(CheckpointError, r"its shards don't make a whole model .*Fix: copy the files of all ranks")
    (checkpoint / "latest").write_text("../elsewhere")
    refused(CheckpointError, r"names '\.\./elsewhere', which is no global_stepN folder")
