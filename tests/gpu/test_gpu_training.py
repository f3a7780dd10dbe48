"""The methods under ZeRO on real GPUs: NCCL, CUDA kernels, bf16; packed attention's CUDA backends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rm_scale.packing.attention import BACKENDS, AttentionRules
from rm_scale.packing.layout import RowLayout, pack_row
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
    timing = read_json(tmp_path / "out" / "run" / "timing.json")
    peaks = timing["peak_memory"]
    assert 0 < peaks["allocated_bytes"] <= peaks["reserved_bytes"] and timing["load_peak_memory_bytes"] > 0
    assert "GPU" in timing["energy"] or timing["energy"].startswith("not read: ")


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flex", "matmul"])
def test_packed_attention_on_a_gpu(backend: str, window: int | None) -> None:
    """In bf16, against the portable backend in fp32 on a CPU: outputs and all gradients."""
    groups = [[[1] * 70 + [2] * 20, [1] * 70 + [3] * 9, [1] * 70 + [4]], [[5] * 3, [6] * 33]]
    layout = pack_row(groups, True, 0, 64).layout
    rules = AttentionRules(0.125, window)
    torch.manual_seed(0)
    shapes = [(6, layout.width, 64), (2, layout.width, 64), (2, layout.width, 64), (6, layout.width, 64)]
    tensors = [torch.randn(shape).bfloat16().float() for shape in shapes]
    tensors[3][:, layout.num_tokens :] = 0
    results = []
    for name, device, dtype in (("sdpa", "cpu", torch.float32), (backend, "cuda", torch.bfloat16)):
        query, key, value, grad = (tensor.to(device, dtype) for tensor in tensors)
        inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
        out = BACKENDS[name](*inputs, RowLayout(layout.spans, layout.width), rules)
        gradients = torch.autograd.grad(out, inputs, grad)
        results.append([t[:, : layout.num_tokens].float().cpu() for t in (out, *gradients)])
    for expected, given in zip(*results, strict=True):
        torch.testing.assert_close(given, expected, rtol=3e-2, atol=3e-2)
