"""Weights and gradients on the host: how many bytes a rank copies, how long that takes, what stays on a device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rm_scale.known_models import KNOWN_MODELS
from rm_scale.planning.advise import Request, choices, recommend
from rm_scale.planning.estimate import estimate, gathered_bytes, host_memory_bytes, load_peak_bytes, peak_memory
from rm_scale.planning.group_lengths import full_rows
from rm_scale.planning.hardware import known_devices
from rm_scale.planning.host_link import (
    copied_gradient_bytes,
    copied_weight_bytes,
    gradient_copy_seconds,
    weight_copy_seconds,
)
from rm_scale.planning.host_memory import offload_buffer_bytes
from rm_scale.planning.memory import (
    constants_bytes,
    held_gradient_elements,
    model_states,
    offloaded_weight_bytes,
    whole_small_tensors,
)
from rm_scale.planning.parameters import Tensor
from rm_scale.planning.plan_text import estimate_lines, explanation, summary
from rm_scale.planning.scenario import Scenario, default_buckets
from rm_scale.planning.shape import ModelShape, shape_from_config
from rm_scale.planning.step_time import step_time, update_seconds
from tests.support.row_loads import uniform_rows

LLAMA = ModelShape("llama", 1024, 16, 16, 4, 64, 4096, 32000)
MIXTURE = shape_from_config(KNOWN_MODELS["Qwen/Qwen3-30B-A3B"])
GPU = known_devices()["h100-80g"]
# Embedding, and per layer queries and output, keys and values, three matrices of the MLP; norms and head stay whole.
SHARDED = 2 * (32000 * 1024 + 16 * (2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 4096 * 1024))


def scenario(**changes: object) -> Scenario:
    """One GPU with everything on the host; nothing is kept between the forward and the backward pass."""
    base = Scenario(
        LLAMA,
        GPU,
        1,
        uniform_rows(4, 512, 512, "padding_free"),
        offload_optimizer="cpu",
        offload_param="cpu",
        buckets=replace(default_buckets(1024), reuse=0),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def request(**changes: object) -> Request:
    base = Request("mixture", MIXTURE, "lora", GPU, 1, 1, 2048, full_rows(2048))
    return replace(base, **changes)  # type: ignore[arg-type]


def test_one_device_copies_all_weights_in_both_passes() -> None:
    assert copied_weight_bytes(scenario()) == 2 * SHARDED
    assert weight_copy_seconds(scenario()) == pytest.approx(2 * SHARDED / 25e9)
    assert copied_weight_bytes(scenario(checkpointing=False)) == 2 * SHARDED, "recomputation uses what is there"
    assert (
        copied_weight_bytes(scenario(offload_param="none")) == weight_copy_seconds(scenario(offload_param="none")) == 0
    )
    # A third of the 1e9 elements that DeepSpeed keeps is more than this model has: copied once.
    assert copied_weight_bytes(scenario(buckets=None)) == SHARDED


def test_ranks_copy_their_parts_over_their_own_links_out_of_one_memory() -> None:
    # Two ranks: half of the weights over each link. Eight: all weights out of the node's memory take longer.
    assert weight_copy_seconds(scenario(num_devices=2)) == pytest.approx(2 * SHARDED / 2 / 25e9)
    assert weight_copy_seconds(scenario(num_devices=8)) == pytest.approx(2 * SHARDED / 100e9)
    assert weight_copy_seconds(scenario(num_devices=16, num_nodes=2)) == pytest.approx(2 * SHARDED / 2 / 100e9)
    # hpZ: in the backward pass each node's ranks hold all weights among them, on the host.
    with_hpz = scenario(num_devices=16, num_nodes=2, hpz=8)
    assert copied_weight_bytes(with_hpz) == SHARDED / 16 + SHARDED / 8
    assert offloaded_weight_bytes(with_hpz) > model_states(with_hpz).second_weights


def test_memory_that_is_not_page_locked_is_copied_twice() -> None:
    assert weight_copy_seconds(scenario(pin_memory=False)) == pytest.approx(2 * weight_copy_seconds(scenario()))
    eight = scenario(num_devices=8)
    assert weight_copy_seconds(replace(eight, pin_memory=False)) == pytest.approx(3 * weight_copy_seconds(eight))


def test_weights_on_disk_are_read_first_and_written_after_the_update() -> None:
    on_disk = scenario(num_devices=2, offload_param="nvme", offload_optimizer="nvme")
    assert weight_copy_seconds(on_disk) == pytest.approx(2 * SHARDED / 6e9 + 2 * SHARDED / 2 / 25e9)
    assert weight_copy_seconds(replace(on_disk, pin_memory=False)) == weight_copy_seconds(on_disk)
    written = update_seconds(on_disk) - update_seconds(replace(on_disk, offload_param="cpu"))
    assert written == pytest.approx(2 * on_disk.num_trained / 6e9)


def test_a_processor_copies_nothing_from_its_own_memory() -> None:
    cpu = scenario(device=known_devices()["cpu"])
    assert weight_copy_seconds(cpu) == 0 == gathered_bytes(cpu)
    assert weight_copy_seconds(replace(cpu, offload_param="nvme")) == pytest.approx(2 * SHARDED / 6e9)


def test_copies_grow_with_the_weights_and_with_the_micro_steps() -> None:
    deeper = [replace(LLAMA, num_layers=layers) for layers in (16, 32, 48)]
    seconds = [weight_copy_seconds(scenario(shape=shape)) for shape in deeper]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0]) and seconds[1] > seconds[0]
    one, ten = (step_time(scenario(num_micro_steps=steps)) for steps in (1, 10))
    assert ten.weight_copies == one.weight_copies > 0
    assert ten.high - ten.update == pytest.approx(10 * (one.high - one.update))
    assert one.low >= one.weight_copies + one.update


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("shape", [LLAMA, MIXTURE], ids=["dense", "mixture"])
def test_weights_on_the_host_are_never_faster(method: str, shape: ModelShape) -> None:
    for devices, nodes in ((1, 1), (2, 1), (8, 1), (16, 2)):
        for name in ("h100-80g", "4090", "cpu"):
            for checkpointing in (False, True):
                kept = scenario(
                    shape=shape,
                    method=method,
                    device=known_devices()[name],
                    num_devices=devices,
                    num_nodes=nodes,
                    checkpointing=checkpointing,
                    buckets=None,
                    offload_param="none",
                )
                for place in ("cpu", "nvme"):
                    usual, slower = step_time(kept), step_time(replace(kept, offload_param=place))
                    assert usual.low <= slower.low and usual.high <= slower.high
                    assert name == "cpu" or usual.high < slower.high


def test_advice_keeps_weights_on_devices_that_hold_them() -> None:
    best = recommend(request())
    assert best.estimate.fits and best.offload == "none"
    offloaded = recommend(request(offload="all"))
    assert offloaded.zero_stage == 3 and offloaded.estimate.scenario.offload_param == "cpu"
    assert offloaded.estimate.time.high > best.estimate.time.high
    assert {way.zero_stage for way in choices(request(offload="optimizer"))} == {3}
    assert {way.zero_stage for way in choices(request(offload="optimizer", num_devices=2))} == {2, 3}


def test_what_a_device_holds_of_weights_on_the_host() -> None:
    alone = scenario(shape=MIXTURE, method="lora", buckets=None)
    parts = peak_memory(alone)
    assert parts["weights"] == whole_small_tensors(alone) > 0
    # At least a layer's experts: 128 of three matrices of 768 x 2,048.
    assert parts["gathered_weights"] > 2 * 128 * 3 * 768 * 2048
    assert gathered_bytes(replace(alone, offload_param="none")) == 0, "a single rank's weights are used as they lie"
    assert load_peak_bytes(alone) < 10e9 < 60e9 < load_peak_bytes(replace(alone, offload_param="none"))
    assert host_memory_bytes(alone) > 60e9
    quantised = replace(alone, method="qlora")
    constants = sum(t.count * constants_bytes(quantised, t) for t in quantised.frozen if t.is_4bit)
    assert peak_memory(quantised)["weights"] == whole_small_tensors(quantised) + constants


def test_the_plan_says_what_is_on_the_host() -> None:
    asked = request(offload="all", device=known_devices()["4090"])
    best = recommend(asked)
    text = summary(asked, best, None, None)
    assert "fits if each node has 62 GB of memory: ZeRO-3, all on the host" in text
    assert "weights                      0.00   (60.47 GB in the host's memory)" in text
    assert "trains 13,371,392 parameters, adapters and head: 0.04% of all" in text
    lines = "\n".join(estimate_lines(best.estimate))
    assert "weights 0.00 (60.47 GB in the host's memory)" in lines and "host memory 62 GB per node" in lines
    assert "are on the node; each rank copies" in explanation(best.estimate)
    on_device = recommend(request())
    assert "\nfits: no ZeRO" in summary(request(), on_device, None, None)
    assert "copies" not in explanation(on_device.estimate)
    assert "host memory" not in "\n".join(estimate_lines(on_device.estimate))


def test_a_plan_bound_by_copies_says_so() -> None:
    few = estimate(scenario(shape=MIXTURE, method="lora", load=uniform_rows(1, 64, 64, "padding_free"), buckets=None))
    assert few.time.bound_by == "weight copies"
    asked = request(offload="all", max_tokens=4096, checkpointing=True, global_batch_size=1)
    text = summary(asked, recommend(asked), None, None)
    assert "bound by weight copies" in text
    assert "copying weights from the host takes longer than computing below" in text
    assert "weights on the devices (--offload optimizer or none)" in text


def test_the_explanation_gives_both_kinds_of_a_quantised_models_weights() -> None:
    quantised = recommend(request(method="qlora")).estimate
    text = explanation(quantised)
    # Attention of 48 layers: queries and output of 4,096 x 2,048, keys and values of 512 x 2,048.
    packed = 48 * (2 * 4096 + 2 * 512) * 2048
    assert f"{packed:,} frozen in 4 bits, {packed // 2 + packed // 64 * 4:,} B with their constants" in text
    assert "13,371,392 trained of 4 B each" in text and "frozen of 2 B each" in text


def on_host(**changes: object) -> Scenario:
    """The optimizer alone on the host, two ranks."""
    return scenario(**{"offload_param": "none", "num_devices": 2, **changes})


def test_zero_3_sends_a_ranks_gradients_down_and_up_in_every_micro_step() -> None:
    # Two bytes each; every tensor of this model is cut into equal halves.
    for steps in (1, 4):
        case = on_host(num_micro_steps=steps)
        assert copied_gradient_bytes(case) == 2 * 2 * case.num_trained / 2
        assert gradient_copy_seconds(case) == pytest.approx(2 * case.num_trained / 25e9)
    assert copied_gradient_bytes(on_host(offload_optimizer="nvme")) == copied_gradient_bytes(on_host())
    eight = on_host(num_devices=8)
    assert gradient_copy_seconds(eight) == pytest.approx(4 * eight.num_trained / 100e9), "out of one memory"
    assert gradient_copy_seconds(replace(eight, pin_gradients=False)) == pytest.approx(12 * eight.num_trained / 100e9)
    assert gradient_copy_seconds(replace(eight, pin_memory=False)) == gradient_copy_seconds(eight)
    assert copied_gradient_bytes(on_host(offload_optimizer="none")) == 0
    assert gradient_copy_seconds(on_host(device=known_devices()["cpu"])) == 0


def test_zero_2_sums_gradients_on_the_host_only_over_several_micro_steps() -> None:
    alone = on_host(num_devices=1, zero_stage=2)
    assert copied_gradient_bytes(alone) == 0
    four = replace(alone, num_micro_steps=4)
    assert copied_gradient_bytes(four) == 2 * four.num_trained * 7 / 4, "down four times, up three times"
    assert offload_buffer_bytes(four) - offload_buffer_bytes(alone) == 2 * four.num_trained
    assert host_memory_bytes(four) - host_memory_bytes(alone) == 2 * four.num_trained
    on_cpu = replace(four, device=known_devices()["cpu"])
    assert gradient_copy_seconds(on_cpu) == 0 < offload_buffer_bytes(on_cpu) - 4 * on_cpu.num_trained


def test_a_tensor_in_several_ranks_parts_is_kept_whole_by_each() -> None:
    """A matrix of 1,000 elements and a norm of 10, in two groups, cut for two ranks."""
    made = [Tensor("matrix", (10, 100), "linear", 1), Tensor("norm", (10,), "vector", 1)]
    two = on_host(zero_stage=2)
    two.__dict__["trained"] = made
    assert held_gradient_elements(two) == 1010
    made[0] = Tensor("matrix", (10, 10), "linear", 10)
    # Parts of 500 and of 6: (1 + 100 / 500) of each matrix; the norm by both.
    assert held_gradient_elements(two) == pytest.approx((1000 * 1.2 + 2 * 10) / 2)


def test_the_update_receives_gradients_in_fp32() -> None:
    case = on_host(zero_stage=2)
    half = case.num_trained / 2
    # AdamW on the host, both ranks at once: masters and two moments read and written, a gradient and a weight in bf16.
    on_node = 2 * half * (2 * 12 + 2 + 4) / 100e9
    assert update_seconds(case) == pytest.approx(half * (4 + 2) / 25e9 + on_node)


def test_a_plan_bound_by_copies_of_gradients_says_so() -> None:
    wide = replace(LLAMA, num_layers=2, intermediate_size=131072)
    few = estimate(on_host(num_devices=1, shape=wide, load=uniform_rows(1, 64, 64, "padding_free")))
    assert few.time.bound_by == "gradient copies" == few.to_dict()["bound_by"]
    assert few.time.low >= few.time.gradient_copies + few.time.update
    text = explanation(few)
    assert f"each rank copies {4 * few.scenario.num_trained:,} B of them there and back" in text
    assert "are on the node" not in text
    asked = request(
        offload="optimizer",
        shape=wide,
        method="full",
        zero_stage=3,
        max_length=64,
        lengths=full_rows(64),
        global_batch_size=1,
    )
    text = summary(asked, recommend(asked), None, None)
    assert "bound by gradient copies" in text
    assert "copying gradients to the host and back takes longer than computing below" in text
    assert "--offload none" in text
