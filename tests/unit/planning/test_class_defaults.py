"""A config.json that leaves out what its class fills in is read as the class reads it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from rm_scale.known_models import KNOWN_MODELS
from rm_scale.planning.class_defaults import CLASS_DEFAULTS
from rm_scale.planning.families import LAYER_STYLES
from rm_scale.planning.shape import shape_from_config
from tools.class_defaults import READ, defaults_of

STATED = ("model_type", "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Its class fills in no number of chosen experts, so that each of its config.json has one.
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 6}}


@pytest.mark.parametrize("model_type", sorted(LAYER_STYLES))
def test_the_table_is_what_the_classes_fill_in(model_type: str) -> None:
    assert CLASS_DEFAULTS[model_type] == defaults_of(model_type), "run: python tools/class_defaults.py"
    assert set(CLASS_DEFAULTS[model_type]) <= set(READ)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("model_type", sorted(LAYER_STYLES))
def test_few_keys_are_read_as_all_of_them(model_type: str, factor: int) -> None:
    needed = NEEDED.get(model_type, {})
    values = AutoConfig.for_model(model_type).to_dict()
    wider = {name: factor * values[name] for name in ("hidden_size", "n_embd", "d_model") if name in values}
    whole = AutoConfig.for_model(model_type, **wider, **needed).to_dict()
    few = {name: whole[name] for name in STATED if name in whole}
    assert shape_from_config({**few, **needed}) == shape_from_config(whole)


def gemma(**text: Any) -> dict[str, Any]:
    """config.json of Gemma 3 as it lies on the hub, as far as it matters: its class fills in the rest."""
    rope = {"factor": 8.0, "rope_type": "linear"}
    text = {"model_type": "gemma3_text", "rope_scaling": rope, "sliding_window": 1024, **text}
    return {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}


def test_gemma_3_as_it_lies_on_the_hub() -> None:
    small = gemma(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
    large = gemma(
        hidden_size=3840,
        intermediate_size=15360,
        num_attention_heads=16,
        num_hidden_layers=48,
        num_key_value_heads=8,
    )
    largest = gemma(
        hidden_size=5376,
        head_dim=128,
        intermediate_size=21504,
        num_attention_heads=32,
        num_hidden_layers=62,
        num_key_value_heads=16,
    )
    sizes = {"google/gemma-3-4b-it": small, "google/gemma-3-12b-it": large, "google/gemma-3-27b-it": largest}
    for name, config in sizes.items():
        assert shape_from_config(config) == shape_from_config(KNOWN_MODELS[name])


def test_null_is_no_missing_value() -> None:
    """DeepSeek-V2-Lite says that queries are projected directly."""
    values = {**AutoConfig.for_model("deepseek_v3").to_dict(), "q_lora_rank": None}
    latent = shape_from_config(values).latent
    assert latent is not None and latent.query_rank is None
