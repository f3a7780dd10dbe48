"""Every method under every ZeRO stage, on two real ranks, through DeepSpeed's launcher and engine.

One launch per stage, a training of each method in it: what it saves, and what the engine held in memory against what
the planner says, byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rm_scale.planning.hardware import known_devices
from rm_scale.planning.memory import model_states
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.shape import read_model_config, shape_from_config
from tests.support.launching import REPOSITORY, losses, read_json, read_lines, run_cases
from tests.support.marks import mostly_long
from tests.support.row_loads import uniform_rows

pytestmark = pytest.mark.distributed

STAGES = {"none": None, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
STAGES |= {"zero2_offload_optimizer": 2, "zero3_offload_optimizer": 3}
METHODS = {
    "full": ["--gradient_checkpointing", "true"],
    "lora": ["--use_peft", "--use_rslora"],
    "dora": ["--use_peft", "--use_dora"],
    "qlora": ["--use_peft", "--load_in_4bit", "--use_bnb_nested_quant"],
    "qlora_one_level": ["--use_peft", "--load_in_4bit"],
}
NUM_LAYERS = 3
STATES_RUNNER = REPOSITORY / "tests" / "support" / "states_runner.py"
NUM_EVAL = 21  # odd, so that neither ranks nor batches divide it


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that two ranks can't divide evenly, so that every rounding shows."""
    from rm_scale.demo.assets import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("odd"), vocab_size=401, hidden_size=32, layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, odd_model: Path, pairs_file: Path) -> dict[str, Path]:
    """One launch per stage, a training of each method in it; the engines' states are in `run/states-RANK.json`."""
    done: dict[str, Path] = {}

    def launch(stage: str) -> Path:
        if stage not in done:
            folder = tmp_path_factory.mktemp(stage)
            common = ["--model_name_or_path", str(odd_model), "--dataset_path", str(pairs_file), "--disable_tqdm"]
            common += ["--eval_split_size", str(NUM_EVAL), "--per_device_train_batch_size", "3", "--max_steps", "5"]
            common += ["--learning_rate", "5e-3", "--logging_steps", "1", "--sample_scores", "1"]
            if stage != "none":
                common += ["--deepspeed", stage]
            cases = {name: [*common, *flags] for name, flags in METHODS.items()}
            finished = run_cases(folder, cases, runner=STATES_RUNNER)
            assert finished.code == 0, finished.output[-6000:]
            done[stage] = folder
        return done[stage]

    return _Lazy(launch)


class _Lazy(dict[str, Path]):
    """Launch a stage when it is first asked for, so that `-k zero3` starts one job only."""

    def __init__(self, launch) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self._launch = launch

    def __missing__(self, stage: str) -> Path:
        return self._launch(stage)


def tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(file), framework="pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", mostly_long(STAGES, short=["zero3"]))
def test_trains_evaluates_saves_and_verifies(stage: str, method: str, runs: dict[str, Path]) -> None:
    folder = runs[stage] / method
    log = (runs[stage] / "log.txt").read_text()
    assert f"saved and verified {folder}" in log
    plan = read_json(folder / "run" / "plan.json")
    assert (plan["method"], plan["world_size"]) == ({"dora": "lora", "qlora_one_level": "qlora"}.get(method, method), 2)
    assert plan["zero_stage"] == (STAGES[stage] or 0)
    evaluation = read_json(folder / "run" / "evaluation.json")
    assert evaluation["num_pairs"] == NUM_EVAL
    assert len(read_lines(folder / "run" / "evaluation_scores.jsonl")) == NUM_EVAL
    assert len(losses(folder)) == 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", mostly_long(STAGES, short=["zero3"]))
def test_head_is_saved_in_fp32_and_was_trained(stage: str, method: str, runs: dict[str, Path]) -> None:
    folder = runs[stage] / method
    saved = tensors(folder / ("model.safetensors" if method == "full" else "adapter_model.safetensors"))
    heads = [tensor for name, tensor in saved.items() if name.endswith("score.weight")]
    assert len(heads) == 1
    assert heads[0].shape == (1, 32)
    assert heads[0].dtype == torch.float32
    # A bf16 engine rounds its copy; the saved head is the fp32 master, which bf16 can't hold.
    assert not torch.equal(heads[0], heads[0].bfloat16().float())
    assert not (folder / "training_args.bin").exists()


@pytest.mark.parametrize("stage", mostly_long(STAGES, short=["zero3"]))
def test_adapters_are_not_empty(stage: str, runs: dict[str, Path]) -> None:
    for method in ("lora", "dora", "qlora", "qlora_one_level"):
        saved = tensors(runs[stage] / method / "adapter_model.safetensors")
        lora = {name: tensor for name, tensor in saved.items() if "lora_A" in name or "lora_B" in name}
        assert len(lora) == 2 * NUM_LAYERS * 7  # A and B, seven linear modules in each layer
        assert all(tensor.ndim == 2 and tensor.any() for tensor in lora.values())
        magnitudes = [tensor for name, tensor in saved.items() if "lora_magnitude_vector" in name]
        assert len(magnitudes) == (NUM_LAYERS * 7 if method == "dora" else 0)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_stages_agree(method: str, runs: dict[str, Path]) -> None:
    """Before the first update to bf16's precision; each update, rounded differently in each engine, widens that."""
    expected = losses(runs["zero1"] / method)
    for stage in set(STAGES) - {"none", "zero1"}:
        found = losses(runs[stage] / method)
        assert found[0] == pytest.approx(expected[0], rel=1e-2), stage
        # Up to 2.5 % between processors with and without bf16 instructions; another batch or scale is 10 % and more.
        assert found == pytest.approx(expected, rel=6e-2), stage


@pytest.mark.parametrize("method", [method for method in METHODS if method != "dora"])
@pytest.mark.parametrize("stage", mostly_long(STAGES, short=["zero3"]))
def test_planned_model_states_are_the_engines(stage: str, method: str, runs: dict[str, Path], odd_model: Path) -> None:
    scenario = Scenario(
        shape=shape_from_config(read_model_config(str(odd_model))),
        device=known_devices()["cpu"],
        num_devices=2,
        load=uniform_rows(2, 20, 10, "prefix_shared"),
        method=method.removesuffix("_one_level"),  # type: ignore[arg-type]
        nested_quant=method == "qlora",
        zero_stage=STAGES[stage],
        offload_optimizer="cpu" if "offload" in stage else "none",
        offload_param="cpu" if stage == "zero3_offload" else "none",
        precision="amp" if stage == "none" else "bf16",
    )
    predicted = model_states(scenario)
    for rank in (0, 1):
        measured = read_json(runs[stage] / method / "run" / f"states-{rank}.json")
        assert predicted.weights == measured["weights"]
        assert predicted.masters == measured["masters"]
        assert predicted.moments == measured["moments"]
        assert predicted.gradients == measured["gradients"]


def test_metrics_have_their_fixed_names(runs: dict[str, Path]) -> None:
    line = read_lines(runs["zero3"] / "full" / "run" / "metrics.jsonl")[0]
    fixed = {"step", "loss", "accuracy", "pairs_per_second", "real_tokens_per_second"}
    assert fixed | {"processed_tokens_per_second", "peak_memory_bytes"} <= line.keys()
    assert line["processed_tokens_per_second"] > line["real_tokens_per_second"] > 0


def test_run_folder_holds_all_records(runs: dict[str, Path]) -> None:
    folder = runs["zero3"] / "full"
    for name in ("run_config.yaml", "plan.json", "environment.json", "metrics.jsonl", "data_report.json"):
        assert (folder / "run" / name).stat().st_size > 0, name
    assert (folder / "run" / "rejected_rows.jsonl").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert list(config["id2label"]) == ["0"]
    assert "accuracy" in (folder / "README.md").read_text()
