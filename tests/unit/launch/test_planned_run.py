"""What a tier stands for, beside a configuration that names a model of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rm_scale.cli import main
from rm_scale.errors import ConfigError
from rm_scale.known_models import KNOWN_MODELS
from rm_scale.launch.machine import Machine
from rm_scale.launch.planned_run import (
    deepspeed_name,
    nearest_tier,
    plan_run,
    refuse_another_size,
    refuse_what_does_not_fit,
)
from rm_scale.planning.advise import Choice
from rm_scale.planning.deepspeed_config import read_deepspeed_config
from rm_scale.planning.hardware import known_devices
from tests.support.families import tiny_config


@pytest.fixture
def settings(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    """A configuration that names its model."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model_name_or_path: {tiny_model}\ndataset_path: [{pairs_file}]\noutput_dir: {tmp_path / 'out'}\n"
        "dataset_test_split: none\nmax_length: 64\nbf16: false\n"
    )
    return ["--config", str(file)]


def test_the_model_of_a_configuration_file_wins_over_the_tiers(settings: list[str], tiny_model: Path) -> None:
    machine = Machine(known_devices()["cpu"], 1, 1, None)
    planned = plan_run("13b", settings, machine, check_output=False)
    assert planned.parsed.config.model_name_or_path == str(tiny_model)
    with pytest.raises(ConfigError, match=r"tier='13b': model_name_or_path=.* a model of tier 1b\. Fix: --tier 1b, or"):
        refuse_another_size("13b", planned)
    refuse_another_size("1b", planned)
    refuse_another_size(None, planned)


@pytest.mark.parametrize("more", [[], ["--slurm"]])
def test_launch_refuses_a_tier_of_another_size(
    settings: list[str], more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RM_SCALE_DEVICE", "cpu")
    assert main(["launch", "--dry_run", "--tier", "13b", *more, *settings]) == 2
    assert "a model of tier 1b. Fix: --tier 1b, or name another model" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["1025", "1" + 30 * "0"])
def test_more_devices_than_a_node_has_are_refused(
    settings: list[str], count: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RM_SCALE_DEVICE", "cpu")
    for more in ([], ["--slurm"]):
        assert main(["launch", "--dry_run", "--gpus", count, *more, *settings]) == 2
        told = capsys.readouterr().err
        assert f"gpus={count}: must be at most 1,024. Fix: correct it." in told
        assert "(1 problem)" in told


def test_the_tier_of_a_size() -> None:
    assert [nearest_tier(int(size)) for size in (1e8, 3e9, 7e9, 13e9, 70e9)] == ["1b", "3b", "7b", "13b", "13b"]


def test_a_model_whose_memory_cant_be_predicted_is_started_all_the_same(
    settings: list[str], tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Mamba's scan depends on which kernels are installed; training does not depend on a prediction."""
    folder = tmp_path / "jamba"
    shutil.copytree(tiny_model, folder)
    config = tiny_config("jamba", vocab_size=400, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["JambaForCausalLM"]}))
    machine = Machine(known_devices()["cpu"], 1, 1, None)
    planned = plan_run(None, [*settings, "--model_name_or_path", str(folder)], machine, check_output=False)
    assert planned.predicted is None
    assert "jamba: activation memory of Mamba layers is not modelled" in caplog.text
    refuse_what_does_not_fit(planned, machine, forced=False)
    assert planned.lines() == planned.plan.summary()


@pytest.fixture
def mixture(tmp_path: Path) -> list[str]:
    """A ready LoRA run of Qwen3-30B-A3B, whose config.json is all that a plan needs."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(KNOWN_MODELS["Qwen/Qwen3-30B-A3B"]))
    config = str(Path(__file__).parents[3] / "configs" / "qwen3_30b_a3b_lora.yaml")
    words = ["--config", config, "--model_name_or_path", str(folder), "--dataset_path", "none"]
    return [*words, "--output_dir", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("stage", "offload"),
    [(1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all"), (3, "nvme")],
)
def test_the_shipped_file_of_a_choice_does_what_was_planned(stage: int, offload: Any) -> None:
    name = deepspeed_name(Choice(stage, offload, False, 4096, None, None))  # type: ignore[arg-type]
    zero = read_deepspeed_config(name)["zero_optimization"]
    devices = [(zero.get(part) or {}).get("device", "none") for part in ("offload_optimizer", "offload_param")]
    expected = {"none": ["none"] * 2, "optimizer": ["cpu", "none"], "all": ["cpu"] * 2, "nvme": ["nvme"] * 2}
    assert zero["stage"] == stage and devices == expected[offload]


@pytest.mark.parametrize(
    ("more", "offered", "not_offered"),
    [
        (["--load_in_4bit", "true"], ["--deepspeed none", "--gpus 4"], "--max_length"),
        (["--deepspeed", "none", "--max_length", "40960"], ["--max_length"], "--seq"),
    ],
)
def test_each_change_that_is_offered_makes_the_run_fit(
    mixture: list[str], more: list[str], offered: list[str], not_offered: str
) -> None:
    """As it is printed: options of launch alone, and nothing that has to be left out of a file beside them."""
    machine = Machine(known_devices()["h100-80g"], 1, 1, None)
    planned = plan_run(None, [*mixture, *more], machine, check_output=False)
    with pytest.raises(ConfigError) as caught:
        refuse_what_does_not_fit(planned, machine, forced=False)
    fixes = str(caught.value).partition("Fix: ")[2].partition("; or --force plan")[0].split("; ")
    assert all(any(fix.startswith(start) for fix in fixes) for start in offered), fixes
    assert not any(not_offered in fix for fix in fixes)
    for fix in fixes:
        words = fix.split()
        gpus = int(words[words.index("--gpus") + 1]) if "--gpus" in words else 1
        settings = words[2:] if "--gpus" in words else words
        again = plan_run(None, [*mixture, *more, *settings], Machine(machine.device, gpus, 1, None), check_output=False)
        assert again.predicted is not None and again.predicted.fits, fix
