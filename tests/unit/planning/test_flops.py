"""Operations of a step against numbers worked out by hand."""

from __future__ import annotations

import pytest

from rm_scale.planning.flops import executed_flops, linear_parameters, step_flops
from rm_scale.planning.shape import shape_from_config

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


def test_linear_layers_of_smollm2() -> None:
    # Per layer 2 x 576 x 576 + 2 x 576 x 192 + 3 x 576 x 1536 = 3,538,944.
    assert linear_parameters(shape_from_config(SMOLLM2)) == 30 * 3_538_944


def test_full_fine_tuning_is_six_per_weight_and_token() -> None:
    flops = step_flops(shape_from_config(SMOLLM2), trainable=134_000_000, frozen=0)
    assert flops.per_token == 6 * 106_168_320
    # Scores and weighted values, 2 operations x 576 wide each, half of it causal, forward and twice that backward.
    assert flops.of(0, 1) == 3 * 30 * (2 * 2 * 576) / 2
    assert flops.of(10, 3) == 10 * flops.per_token + 3 * flops.per_square


def test_frozen_weights_have_no_gradient_of_their_own() -> None:
    flops = step_flops(shape_from_config(SMOLLM2), trainable=1_000_000, frozen=100_000_000)
    assert flops.per_token == pytest.approx(2 * 106_168_320 * 2.01)


def test_executed_operations_by_hand() -> None:
    shape = shape_from_config(SMOLLM2)
    forward, attention, down = 2 * 30 * 3_538_944, 4 * 30 * 576, 2 * 30 * 576 * 1536
    # Attention's backward pass is 2.5 times its forward pass.
    assert executed_flops(shape, 10, 7) == 10 * 3 * forward + 7 * 3.5 * attention
    # Recomputed are all products but the last of each layer, unless it is done the older way.
    recomputed = executed_flops(shape, 10, 7, checkpointing=True)
    assert recomputed == 10 * (4 * forward - down) + 7 * 4.5 * attention
    again = executed_flops(shape, 10, 7, checkpointing=True, use_reentrant=True)
    assert again == 10 * 4 * forward + 7 * 4.5 * attention


def test_executed_operations_with_adapters_by_hand() -> None:
    shape = shape_from_config(SMOLLM2)
    query, value, first = 4 * (576 + 576), 4 * (576 + 192), 576 * (576 + 2 * 192)
    base, adapters = 2 * 30 * 3_538_944, 2 * 30 * (query + value)
    found = executed_flops(shape, 10, 0, lora_rank=4, lora_targets=["q_proj", "v_proj"])
    # Frozen weights have no gradient, and in the first layer neither do the inputs of query, key and value.
    assert found == 10 * (2 * base + 3 * adapters - 2 * first - 2 * 4 * 2 * 576)
    full = executed_flops(shape, 10, 0, lora_rank=4, checkpointing=True)
    every = 2 * 30 * 4 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert full == 10 * (3 * base + 4 * every - 2 * 30 * 4 * 576)
