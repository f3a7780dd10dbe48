"""Operations of a step against numbers worked out by hand."""

from __future__ import annotations

import pytest

from rm_scale.planning.compute import linear_parameters, peak_flops, step_flops
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


def test_peaks_are_known_or_not_claimed() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("AMD EPYC") is None
