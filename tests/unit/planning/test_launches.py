"""The counted kernels of a layer are those that torch dispatches for a real one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForSequenceClassification

from rm_scale.planning.families import LAYER_STYLES
from rm_scale.planning.hardware import known_devices
from rm_scale.planning.launches import ZERO3_HOOKS, ZERO_HOOKS, launches_per_layer, num_launches, num_unpacking_launches
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.shape import ModelShape
from tests.support.row_loads import uniform_rows

VIEWS = {"view", "t", "transpose", "unsqueeze", "expand", "slice", "_unsafe_view", "detach", "alias"}
SHAPE = ModelShape("llama", 64, 3, 2, 2, 32, 128, 64)


class Dispatched(TorchDispatchMode):
    """Counts what torch dispatches, views left out, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func._schema.name.split("::")[1] not in VIEWS
        return func(*args, **(kwargs or {}))


def scenario(**changes: object) -> Scenario:
    load = uniform_rows(4, 512, 512, "padding_free")
    base = Scenario(SHAPE, known_devices()["a100-80g"], 1, load, zero_stage=None, checkpointing=False)
    return replace(base, **changes)  # type: ignore[arg-type]


def dispatched(num_layers: int, method: str, checkpointing: bool, amp: bool) -> tuple[int, int]:
    """Return what a micro-step of a real model dispatches, forward and backward."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        num_labels=1,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config).to(torch.float32 if amp else torch.bfloat16)
    if method == "lora":
        adapters = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules="all-linear", r=4, lora_dropout=0.05)
        model = get_peft_model(model, adapters)
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with Dispatched() as forward, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.sum()
    with Dispatched() as backward:
        loss.backward()
    return forward.count, backward.count


@pytest.mark.parametrize(
    ("method", "checkpointing", "amp"),
    [("full", False, False), ("full", True, False), ("lora", False, False), ("lora", True, True)],
)
def test_kernels_of_a_layer_are_those_that_torch_dispatches(method: str, checkpointing: bool, amp: bool) -> None:
    one, three = (dispatched(layers, method, checkpointing, amp) for layers in (1, 3))
    per_layer = [(more - less) / 2 for less, more in zip(one, three, strict=True)]
    planned = scenario(method=method, checkpointing=checkpointing, precision="amp" if amp else "bf16")
    assert launches_per_layer(planned, SHAPE.layers[0]).forward == pytest.approx(per_layer[0], rel=0.12)
    assert num_launches(planned) / SHAPE.num_layers == pytest.approx(sum(per_layer), rel=0.12)


def test_fused_layers_and_those_of_gpt_launch_fewer() -> None:
    gpt = replace(SHAPE, style=LAYER_STYLES["gpt_neox"], model_type="gpt_neox")
    assert num_launches(scenario(fused=True)) < num_launches(scenario()) / 2
    assert num_launches(scenario(shape=gpt)) < num_launches(scenario())


def test_hooks_of_zero_take_the_host_s_time_too() -> None:
    plain = num_launches(scenario())
    assert num_launches(scenario(zero_stage=3)) == plain + ZERO3_HOOKS * 9 * 2 * 3
    assert num_launches(scenario(zero_stage=3, checkpointing=True)) - num_launches(
        scenario(checkpointing=True)
    ) == pytest.approx(ZERO3_HOOKS * 9 * 3 * 3)
    assert num_launches(scenario(zero_stage=2)) == plain + ZERO_HOOKS * 9 * 3


def test_four_bit_weights_are_unpacked_by_kernels_of_their_own() -> None:
    nf4 = scenario(method="qlora")
    gptq = replace(nf4, shape=replace(SHAPE, quantization="gptq"))
    assert num_unpacking_launches(scenario(method="lora")) == 0
    assert num_unpacking_launches(nf4) == 14 * 3  # one each way, layer and matrix
    assert num_unpacking_launches(gptq) == 70 * 3
    again = num_unpacking_launches(replace(gptq, checkpointing=True))
    assert again == 2 * num_unpacking_launches(gptq)
    assert num_launches(nf4) == num_launches(gptq) == num_launches(scenario(method="lora"))
