"""The planner's model states, byte for byte, against what real engines hold on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rm_scale.planning.hardware import known_devices
from rm_scale.planning.memory import model_states
from rm_scale.planning.scenario import Scenario, uniform_rows
from rm_scale.planning.shape import read_model_config, shape_from_config
from tests.support.launching import REPOSITORY, deepspeed_command, read_json, run

pytestmark = pytest.mark.distributed

STAGES = {"none": None, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
METHODS = {
    "full": [],
    "lora": ["--use_peft"],
    "qlora": ["--use_peft", "--load_in_4bit"],
    "qlora_nested": ["--use_peft", "--load_in_4bit", "--use_bnb_nested_quant"],
}
RUNNER = REPOSITORY / "tests" / "support" / "states_runner.py"


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that two ranks can't divide evenly, so that every rounding shows."""
    from rm_scale.modeling.assets import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("odd"), vocab_size=401, hidden_size=32, layers=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, odd_model: Path, pairs_file: Path) -> dict[str, Path]:
    """Two steps of every method under every stage; the engines' states are in `run/states-RANK.json`."""
    done = {}
    for stage in STAGES:
        folder = tmp_path_factory.mktemp(stage)
        common = ["--model_name_or_path", str(odd_model), "--dataset_path", str(pairs_file), "--disable_tqdm"]
        common += ["--per_device_train_batch_size", "2", "--max_steps", "2", "--logging_steps", "1"]
        common += ["--sample_scores", "0", *([] if stage == "none" else ["--deepspeed", stage])]
        cases = {name: [*common, *flags, "--output_dir", str(folder / name)] for name, flags in METHODS.items()}
        (folder / "cases.json").write_text(json.dumps(cases))
        finished = run(deepspeed_command(RUNNER, str(folder / "cases.json")))
        assert finished.code == 0, finished.output[-5000:]
        done[stage] = folder
    return done


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_states_are_exact(stage: str, method: str, runs: dict[str, Path], odd_model: Path) -> None:
    shape = shape_from_config(read_model_config(str(odd_model)))
    uses_engine = stage != "none"
    scenario = Scenario(
        shape=shape,
        device=known_devices()["cpu"],
        num_devices=2,
        load=uniform_rows(2, 20, 10, "prefix_shared"),
        method="qlora" if method == "qlora_nested" else method,  # type: ignore[arg-type]
        nested_quant=method == "qlora_nested",
        zero_stage=STAGES[stage],
        precision="bf16" if uses_engine else "amp",
    )
    predicted = model_states(scenario)
    for rank in (0, 1):
        measured = read_json(runs[stage] / method / "run" / f"states-{rank}.json")
        assert predicted.weights == measured["weights"]
        assert predicted.masters == measured["masters"]
        assert predicted.moments == measured["moments"]
        assert predicted.gradients == measured["gradients"]
