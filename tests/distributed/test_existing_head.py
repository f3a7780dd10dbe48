"""Training on from an existing reward model starts from its head exactly, also where the engine runs in bf16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from tests.support.launching import run_cases

pytestmark = pytest.mark.distributed

CASES = {
    "zero2": "--deepspeed zero2",
    "zero3": "--deepspeed zero3",
    "zero3_lora": "--deepspeed zero3 --use_peft",
    "ddp_lora": "--use_peft",
}


def _heads_after_a_step(model: Path, pairs_file: Path, outputs: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Train one step with each case's flags; return the heads that were saved."""
    # A step of 1e-12 is below fp32's resolution at these weights: what comes out is what went in.
    common = f"--model_name_or_path {model} --dataset_path {pairs_file} --max_steps 1 --learning_rate 1e-12"
    common += " --sample_scores 0 --disable_tqdm"
    finished = run_cases(outputs, {name: [*common.split(), *CASES[name].split()] for name in names})
    assert finished.code == 0, finished.output[-5000:]
    heads = {}
    for name in names:
        file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
        saved = load_file(outputs / name / file)
        (key,) = [key for key in saved if key.endswith("score.weight")]
        heads[name] = saved[key]
    return heads


def test_head_is_bit_for_bit_the_old_one(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    set_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "rm")
    head = model.score.weight.detach()
    assert not torch.equal(head, head.bfloat16().float())
    for name, found in _heads_after_a_step(tmp_path / "rm", pairs_file, tmp_path / "runs", list(CASES)).items():
        assert torch.equal(found, head), name


@pytest.mark.long
def test_a_head_under_another_name_reaches_every_shard(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Here transformers makes a random head, sharded under ZeRO-3, and the stored one is written into it."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "rm"))
    head = torch.randn(1, json.loads((folder / "config.json").read_text())["hidden_size"])
    save_file({"v_head.summary.weight": head}, folder / "value_head.safetensors")
    names = ["zero2", "zero3", "zero3_lora"]
    for name, found in _heads_after_a_step(folder, pairs_file, tmp_path / "runs", names).items():
        assert torch.equal(found, head), name
