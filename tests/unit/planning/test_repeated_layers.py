"""Layers that are left out of the replay change nothing of what it says."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.activation_cases import MODELS
from rm_scale.planning.activations import decoder
from rm_scale.planning.activations.activation_memory import activation_memory
from rm_scale.planning.activations.repeated_layers import Layers, repeated_layers
from rm_scale.planning.activations.settings import Options, Row
from rm_scale.planning.layer_parts import LayerKind
from rm_scale.planning.shape import shape_from_config

PLAIN, DELTA, EXPERTS = LayerKind(), LayerKind("delta"), LayerKind(feed_forward="experts")


def test_what_repeats_is_found() -> None:
    assert repeated_layers([PLAIN] * 12) == Layers((PLAIN,), (PLAIN,), 8, (PLAIN,) * 2)
    assert repeated_layers([LayerKind(window=size) for size in (1, None, 3, 4, 5, 6)]).left_out == 2
    four = [DELTA, DELTA, DELTA, PLAIN]
    found = repeated_layers(four * 8)
    assert found == Layers(tuple(four), tuple(four), 4, tuple(four * 2))
    found = repeated_layers([PLAIN, *[EXPERTS] * 11])
    assert found == Layers((PLAIN, EXPERTS), (EXPERTS,), 7, (EXPERTS,) * 2)


@pytest.mark.parametrize("layers", [[PLAIN] * 4, [PLAIN, DELTA] * 4, [PLAIN] * 9 + [DELTA] * 9, []])
def test_few_layers_and_no_pattern_are_replayed_whole(layers: list[LayerKind]) -> None:
    assert repeated_layers(layers).before == tuple(layers)


@pytest.mark.parametrize("model", ["Llama-3.2-1B", "Gemma-2-2B", "Qwen3-30B-A3B", "Qwen3.5-9B"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_nothing_changes(model: str, checkpointing: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_from_config(MODELS[model] | {"num_hidden_layers": 20})
    row = Row(2048, 2048, 2)
    for reentrant in (False, True):
        options = Options(checkpointing=checkpointing, method=method, use_reentrant=reentrant, lora_dropout=0.05)
        short = activation_memory.__wrapped__(shape, row, options)
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "repeated_layers", lambda layers: Layers(tuple(layers), (), 0, ()))
            assert activation_memory.__wrapped__(shape, row, options) == short
