"""What a micro-step's time is made of: worked out by hand for small shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rm_scale.planning import step_time
from rm_scale.planning.elementwise import DROPOUT, Moved, adapter_bytes, layer_bytes
from rm_scale.planning.families import LAYER_STYLES
from rm_scale.planning.hardware import known_devices
from rm_scale.planning.launches import num_launches
from rm_scale.planning.layer_parts import Experts, LayerKind
from rm_scale.planning.parameters import Tensor
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.shape import ModelShape
from tests.support.row_loads import uniform_rows

LLAMA = ModelShape("llama", 1024, 16, 16, 4, 64, 4096, 32000)
GPT = ModelShape("gpt_neox", 1024, 16, 16, 16, 64, 4096, 32000, style=LAYER_STYLES["gpt_neox"])
MIXTURE = replace(
    LLAMA,
    model_type="mixtral",
    experts=Experts(num=8, chosen=2, width=512),
    kinds=(LayerKind(feed_forward="experts"),) * 16,
)
DEVICE = known_devices()["a100-80g"]


def scenario(**changes: object) -> Scenario:
    base = Scenario(LLAMA, DEVICE, 1, uniform_rows(4, 512, 512, "padding_free"), zero_stage=None, checkpointing=False)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_elementwise_bytes_of_a_layer() -> None:
    # Two fused norms, two residual sums, GELU at four times the width, RoPE on queries and keys.
    found = layer_bytes(GPT, LayerKind(), fused=False)
    assert found.forward == 2 * 4 * 1024 + 12 * 1024 + 4 * 4096 + 20 * 2 * 1024
    assert found.backward == 2 * 10 * 1024 + (12 + 12) * 1024 + 6 * 4096 + 30 * 2 * 1024
    python, merged = layer_bytes(LLAMA, LayerKind(), fused=False), layer_bytes(LLAMA, LayerKind(), fused=True)
    assert python.forward == 2 * 36 * 1024 + 12 * 1024 + 10 * 4096 + 20 * (1024 + 256)
    assert merged.forward < python.forward / 2 and merged.backward < python.backward / 2


def test_recomputing_moves_the_forward_pass_again() -> None:
    assert Moved(3, 5).passes(recomputed=True) == 11
    assert Moved(3, 5).passes(recomputed=False) == 8


def test_adapters_move_their_inputs_and_outputs() -> None:
    pair = [Tensor("q_proj.lora_A", (8, 100), "adapter", 2), Tensor("q_proj.lora_B", (60, 8), "adapter", 2)]
    assert adapter_bytes(pair, dropout=False, fused=False).forward == 2 * (2 * 100 + 12 * 60)
    with_dropout = adapter_bytes(pair, dropout=True, fused=False)
    assert with_dropout.forward == 2 * ((2 + DROPOUT.forward) * 100 + 12 * 60)
    assert adapter_bytes([], dropout=True, fused=False) == Moved(0, 0)


def test_layers_take_no_less_than_their_launches() -> None:
    few = scenario(load=uniform_rows(0.01, 512, 512, "padding_free"))
    assert step_time.compute_seconds(few) == pytest.approx(num_launches(few) * DEVICE.launch_seconds)
    four_bit = replace(few, method="qlora")
    assert step_time.compute_seconds(four_bit) == pytest.approx(
        step_time.launch_seconds(four_bit) + step_time.dequantise_seconds(four_bit)
    )
    many = scenario()
    parts = step_time.compute_parts(many)
    assert step_time.compute_seconds(many) == pytest.approx(sum(parts.values()) - parts["launches"])


def test_updates_move_what_they_keep() -> None:
    # fp32 master and two moments there and back, a gradient in fp32, a weight in 16 bits.
    assert step_time.update_bytes_per_weight(scenario()) == 2 * (4 + 8) + 4 + 2
    pure = scenario(master_bytes=0, optimizer_bytes=4.0)
    assert step_time.update_bytes_per_weight(pure) == 2 * 4 + 2 + 4
    assert step_time.update_seconds(replace(pure, fused_update=False)) == pytest.approx(
        3 * step_time.update_seconds(pure)
    )


def test_few_tokens_wait_for_weights() -> None:
    # Two passes, and gradients written and added: 2 bytes each.
    linear = 16 * (1024 * 64 * (2 * 16 + 2 * 4) + 3 * 1024 * 4096)
    assert step_time.weight_traffic(scenario()) == 4 * 2 * linear
    assert step_time.weight_traffic(scenario(method="lora")) == 2 * 2 * linear
    assert step_time.weight_traffic(scenario(precision="fp32")) == 4 * 4 * linear


def test_heads_of_language_models_cost_and_reward_heads_do_not() -> None:
    assert step_time.compute_parts(scenario())["head"] == 0
    logits = 8192 * 32000
    assert step_time.head_traffic(scenario(head="lm")) == step_time.LOGIT_BYTES * logits
    # Logits are 31.25 times as wide as hidden states: 8192 tokens / 32 = 256 at once, 32 chunks.
    assert step_time.head_chunks(scenario(head="lm_chunked")) == 32
    chunked = step_time.head_traffic(scenario(head="lm_chunked"))
    assert chunked == 32 * 6 * 2 * 32000 * 1024 + 8 * logits
    assert step_time.head_chunks(scenario(head="lm_chunked", head_chunks=8)) == 8


def test_other_checkpoints_in_four_bits_count_as_nf4() -> None:
    wide = replace(LLAMA, hidden_size=8192, head_dim=512, intermediate_size=32768)  # its bytes take longest
    nf4, awq, gptq = (
        step_time.dequantise_seconds(scenario(method="qlora", shape=replace(wide, quantization=name)))
        for name in (None, "awq", "gptq")
    )
    assert awq == nf4
    assert gptq == pytest.approx(2.5 * nf4)
    assert step_time.dequantise_seconds(scenario(method="lora")) == 0


def test_unpacking_takes_no_less_than_its_launches() -> None:
    narrow = scenario(method="qlora", shape=replace(LLAMA, hidden_size=64, intermediate_size=128, head_dim=4))
    assert step_time.dequantise_seconds(narrow) == pytest.approx(16 * 14 * DEVICE.launch_seconds)


def test_older_attention_is_slower() -> None:
    newer, older = (step_time.compute_parts(scenario(attention=name))["attention"] for name in ("varlen", "flash1"))
    assert older == pytest.approx(newer * 0.72 / 0.39)


def test_a_single_figure_lies_within_the_band() -> None:
    time = step_time.StepTime(compute=3.0, communication=2.0, step_communication=0.1, update=0.2, num_micro_steps=2)
    assert (time.low, time.high) == (pytest.approx(6.3), pytest.approx(10.3))
    assert time.expected == pytest.approx(10.3 - 0.25 * 4)


def test_uneven_loads_of_experts_widen_the_band() -> None:
    # 8 experts of 3 x 1,024 x 512 weights in each of 16 layers; at worst each computes 127 rows too many.
    run = scenario(shape=MIXTURE)
    time = step_time.step_time(run)
    rate = DEVICE.matmul_flops * DEVICE.step_efficiency
    assert time.imbalance == pytest.approx(2 * 8 * 127 * 16 * 3 * 1024 * 512 * 3 / rate)
    assert time.high - time.low >= time.imbalance
    # A single token is at two experts only; and dense layers and processors have no such tiles.
    one = scenario(shape=MIXTURE, load=replace(run.load, tokens=1))
    assert step_time.step_time(one).imbalance == pytest.approx(time.imbalance / 4)
    assert step_time.step_time(scenario()).imbalance == 0
    assert step_time.step_time(scenario(shape=MIXTURE, device=known_devices()["cpu"])).imbalance == 0


def test_adapters_of_experts_cost_passes_over_all_experts() -> None:
    of_experts = 16 * 8 * 3 * 1024 * 512
    without = scenario(shape=MIXTURE, method="lora")
    adapted = replace(without, lora_parameters=("experts.gate_up_proj", "experts.down_proj"))
    # Twice read and written forwards; the copy's gradient written once and read twice.
    moved = step_time.weight_traffic(adapted) - step_time.weight_traffic(without)
    assert moved == 2 * of_experts * (2 * 2 + 3)
    # Multiplied out twice forwards, two products backwards; and the weight's gradient of two experts in eight.
    added = step_time.micro_step_flops(adapted).linear - step_time.micro_step_flops(without).linear
    assert added == pytest.approx(2 * 16 * of_experts * 4 + 2 * without.load.tokens * of_experts / 4)
    assert step_time.elementwise_bytes(adapted) == step_time.elementwise_bytes(without)


def test_selective_checkpointing_recomputes_half_of_the_products() -> None:
    none, some, full = (
        step_time.micro_step_flops(scenario(checkpointing=full, selective_checkpointing=some)).linear
        for full, some in ((False, False), (False, True), (True, False))
    )
    assert some - none == pytest.approx((full - none) / 2)
