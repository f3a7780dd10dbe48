"""The methods under ZeRO on real GPUs: NCCL, CUDA kernels, bf16."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.launching import TRAIN, deepspeed_command, environment, losses, read_json, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("stage", ["zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_method_trains_and_its_save_is_verified(
    method: str, stage: str, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--eval_split_size", "21"]
    words += ["--deepspeed", stage, "--max_steps", "5", "--learning_rate", "1e-3", "--logging_steps", "1"]
    words += [] if method == "full" else ["--use_peft"]
    words += ["--load_in_4bit"] if method == "qlora" else []
    env = environment()
    del env["DS_ACCELERATOR"], env["CUDA_VISIBLE_DEVICES"]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    command = deepspeed_command(TRAIN, *words, "--output_dir", str(tmp_path / "out"), ranks=torch.cuda.device_count())
    done = run(command, env=env)
    assert done.code == 0, done.output[-4000:]
    assert f"saved and verified {tmp_path / 'out'}" in done.output
    assert read_json(tmp_path / "out" / "run" / "plan.json")["device"] == "cuda"
    assert len(losses(tmp_path / "out")) == 5
