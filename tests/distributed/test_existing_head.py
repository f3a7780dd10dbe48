"""Training on from an existing reward model starts from its head exactly, also where the engine runs in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from tests.support.launching import run_cases

pytestmark = pytest.mark.distributed

CASES = {
    "zero2": "--deepspeed zero2",
    "zero3": "--deepspeed zero3",
    "zero3_lora": "--deepspeed zero3 --use_peft",
    "ddp_lora": "--use_peft",
}


def test_head_is_bit_for_bit_the_old_one(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    set_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "rm")
    head = model.score.weight.detach()
    assert not torch.equal(head, head.bfloat16().float())
    # A step of 1e-12 is below fp32's resolution at these weights: what comes out is what went in.
    common = f"--model_name_or_path {tmp_path / 'rm'} --dataset_path {pairs_file} --max_steps 1 --learning_rate 1e-12"
    common += " --sample_scores 0 --disable_tqdm"
    finished = run_cases(tmp_path / "runs", {name: [*common.split(), *flags.split()] for name, flags in CASES.items()})
    assert finished.code == 0, finished.output[-5000:]
    for name in CASES:
        file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
        saved = load_file(tmp_path / "runs" / name / file)
        (key,) = [key for key in saved if key.endswith("score.weight")]
        assert torch.equal(saved[key], head), name
