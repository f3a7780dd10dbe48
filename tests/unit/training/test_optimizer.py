"""The optimizer that runs for `adamw_torch`: fused on CUDA, as it was on a CPU; and its state through a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from rm_scale.config import RunConfig
from rm_scale.config_parsing import config_from_dict
from rm_scale.planning.optimizer_choice import optimizer_that_runs
from rm_scale.planning.plan import Plan, make_plan
from rm_scale.training.arguments import training_arguments
from rm_scale.training.checkpoint.optimizer_state import is_portable, read_state, write_state

FUSED = "adamw_torch_fused"


def settings(model: Path, data: Path, output: Path, **more: Any) -> tuple[RunConfig, Plan]:
    paths = {"model_name_or_path": str(model), "dataset_path": str(data), "output_dir": str(output)}
    parsed = config_from_dict({**paths, "bf16": False, **more})
    return parsed.config, make_plan(parsed, 1, "cpu").with_data(8, 0, 2)


@pytest.mark.parametrize(
    ("asked", "device", "deepspeed", "offload", "fp16", "runs"),
    [
        ("adamw_torch", "cuda", False, "none", False, FUSED),
        ("adamw_torch", "cuda", True, "none", False, FUSED),
        ("adamw_torch", "cpu", True, "none", False, "adamw_torch"),
        # DeepSpeed's own Adam runs on the host.
        ("adamw_torch", "cuda", True, "cpu", False, "adamw_torch"),
        ("adamw_torch", "cuda", True, "nvme", False, "adamw_torch"),
        # torch's loss scaler steps it, and would not say what it leaves out; DeepSpeed's does.
        ("adamw_torch", "cuda", False, "none", True, "adamw_torch"),
        ("adamw_torch", "cuda", True, "none", True, FUSED),
        ("adafactor", "cuda", False, "none", False, "adafactor"),
    ],
)
def test_what_runs(asked: str, device: str, deepspeed: bool, offload: str, fp16: bool, runs: str) -> None:
    config = RunConfig(model_name_or_path="m", dataset_path=["d"], output_dir="o").model_copy(
        update={"optim": asked, "fp16": fp16, "bf16": not fp16}
    )
    name, note = optimizer_that_runs(config, device, deepspeed, offload)
    assert name == runs and (note is None) == (runs == asked)
    assert note is None or note.startswith("optim adamw_torch runs fused on cuda")


def test_a_scaler_leaves_steps_out_inside_a_fused_optimizer() -> None:
    """Why fp16 without DeepSpeed keeps the other one: torch's scaler calls a fused one even when a step is left out."""
    weight = torch.zeros(2, requires_grad=True)
    assert torch.optim.AdamW([weight], fused=True)._step_supports_amp_scaling
    assert not hasattr(torch.optim.AdamW([weight]), "_step_supports_amp_scaling")


def test_transformers_makes_it(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    config, plan = settings(tiny_model, pairs_file, tmp_path / "out")
    on_cpu = training_arguments(config, plan)
    kind, values = Trainer.get_optimizer_cls_and_kwargs(on_cpu)
    assert on_cpu.optim == "adamw_torch" and kind is torch.optim.AdamW and "fused" not in values
    on_cuda = training_arguments(config, replace(plan, device="cuda"))
    kind, values = Trainer.get_optimizer_cls_and_kwargs(on_cuda)
    assert on_cuda.optim == FUSED and kind is torch.optim.AdamW and values["fused"] is True
    assert config.optim == "adamw_torch", "what was asked for is what a resumed run is held to"
    other, _ = settings(tiny_model, pairs_file, tmp_path / "out", optim="adafactor")
    assert training_arguments(other, replace(plan, device="cuda")).optim == "adafactor"


class Small(torch.nn.Module):
    """Two weights, and a few steps on made-up data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(5, 7)
        self.second = torch.nn.Linear(7, 1)

    def train_on(self, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            self.second(torch.tanh(self.first(inputs))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def adam(model: Small, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **({"fused": True} if fused else {}))


def weights(model: Small) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("wrote_fused", [True, False])
def test_its_state_goes_through_a_checkpoint(wrote_fused: bool, tmp_path: Path) -> None:
    """Bit for bit when it was written by a fused one; a run that began on a CPU may go on fused."""
    model = Small()
    optimizer = adam(model, wrote_fused)
    model.train_on(optimizer, range(3))
    assert is_portable(model, None, optimizer)
    write_state(tmp_path, model, None, optimizer, 0, 1)
    resumed = Small()
    again = adam(resumed, fused=True)
    read_state(tmp_path, resumed, None, again)
    assert torch.equal(weights(resumed), weights(model))
    for parameter, state in again.state.items():
        assert float(state["step"]) == 3 and state["step"].dtype is torch.float32
        assert state["step"].device == parameter.device, "a fused one counts where the weights are"
    counts = [state["step"].data_ptr() for state in again.state.values()]
    assert len(set(counts)) == 4, "each weight has a count of its own"
    model.train_on(optimizer, range(3, 6))
    resumed.train_on(again, range(3, 6))
    if wrote_fused:
        assert torch.equal(weights(resumed), weights(model))
    torch.testing.assert_close(weights(resumed), weights(model), rtol=1e-6, atol=1e-7)


def test_both_kinds_do_the_same() -> None:
    model = Small()
    other = copy.deepcopy(model)
    model.train_on(adam(model, fused=True), range(20))
    other.train_on(adam(other, fused=False), range(20))
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-5, atol=1e-6)
