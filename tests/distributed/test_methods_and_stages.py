"""Every method under every ZeRO stage, on two real ranks, through DeepSpeed's launcher and engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.support.launching import losses, read_json, read_lines, run_cases

pytestmark = pytest.mark.distributed

STAGES = ["none", "zero1", "zero2", "zero3", "zero3_offload"]
METHODS = {
    "full": ["--gradient_checkpointing", "true"],
    "lora": ["--use_peft", "--use_rslora"],
    "dora": ["--use_peft", "--use_dora"],
    "qlora": ["--use_peft", "--load_in_4bit", "--use_bnb_nested_quant"],
}
NUM_EVAL = 21  # odd, so that neither ranks nor batches divide it


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs_file: Path) -> dict[str, Path]:
    """One launch per stage, a training of each method in it."""
    done: dict[str, Path] = {}

    def launch(stage: str) -> Path:
        if stage not in done:
            folder = tmp_path_factory.mktemp(stage)
            common = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--disable_tqdm"]
            common += ["--eval_split_size", str(NUM_EVAL), "--per_device_train_batch_size", "3", "--max_steps", "5"]
            common += ["--learning_rate", "5e-3", "--logging_steps", "1", "--sample_scores", "1"]
            if stage != "none":
                common += ["--deepspeed", stage]
            finished = run_cases(folder, {name: [*common, *flags] for name, flags in METHODS.items()})
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
@pytest.mark.parametrize("stage", STAGES)
def test_trains_evaluates_saves_and_verifies(stage: str, method: str, runs: dict[str, Path]) -> None:
    folder = runs[stage] / method
    log = (runs[stage] / "log.txt").read_text()
    assert f"saved and verified {folder}" in log
    plan = read_json(folder / "run" / "plan.json")
    assert (plan["method"], plan["world_size"]) == ("lora" if method == "dora" else method, 2)
    assert plan["zero_stage"] == (0 if stage == "none" else int(stage[4]))
    evaluation = read_json(folder / "run" / "evaluation.json")
    assert evaluation["num_pairs"] == NUM_EVAL
    assert len(read_lines(folder / "run" / "evaluation_scores.jsonl")) == NUM_EVAL
    assert len(losses(folder)) == 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
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


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_are_not_empty(stage: str, runs: dict[str, Path]) -> None:
    for method in ("lora", "dora", "qlora"):
        saved = tensors(runs[stage] / method / "adapter_model.safetensors")
        lora = {name: tensor for name, tensor in saved.items() if "lora_A" in name or "lora_B" in name}
        assert len(lora) == 2 * 2 * 7  # A and B, two layers, seven linear modules
        assert all(tensor.ndim == 2 and tensor.any() for tensor in lora.values())
        magnitudes = [tensor for name, tensor in saved.items() if "lora_magnitude_vector" in name]
        assert len(magnitudes) == (2 * 7 if method == "dora" else 0)


@pytest.mark.parametrize("method", METHODS)
def test_stages_agree(method: str, runs: dict[str, Path]) -> None:
    """bf16 rounds differently in each engine; the trajectories must still be the same to that precision."""
    for stage in STAGES[1:]:
        assert losses(runs[stage] / method) == pytest.approx(losses(runs["zero1"] / method), rel=2e-2), stage


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
