"""Experts and routers are found in every mixture, and said where a promise of 4 bits or of a head can't be kept."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ModelError
from rm_scale.modeling.experts import expert_tensors, num_weights, routers
from rm_scale.modeling.loading import _load_sequence_classifier
from rm_scale.modeling.quantization import quantization_config, report_4bit_size
from tests.support.families import FAMILIES, SIZES, tiny_classifier

# Layers with experts, and whether these have biases; the other families have none.
MIXTURES = {
    "deepseek_v2": 2,
    "deepseek_v3": 2,
    "gpt_oss": 3,
    "jamba": 1,
    "mixtral": 3,
    "phimoe": 3,
    "qwen2_moe": 3,
    "qwen3_moe": 3,
    "qwen3_next": 3,
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_and_routers_are_found(model_type: str) -> None:
    model = tiny_classifier(model_type)
    layers = MIXTURES.get(model_type, 0)
    matrices = [tensor for tensor in expert_tensors(model).values() if tensor.ndim == 3]
    assert len(matrices) == 2 * layers
    assert all(tensor.shape[0] == 4 for tensor in expert_tensors(model).values())
    assert len(routers(model)) == layers
    seen = []
    for router in routers(model).values():
        router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 23).view(2, 10), use_cache=False)
    assert len(seen) == layers
    for logits, weights, chosen in seen:
        assert logits.shape == (20, 4) and weights.shape == chosen.shape == (20, 2)


def _in_4_bits(model_type: str, folder: Path) -> PreTrainedModel:
    tiny_classifier(model_type).save_pretrained(folder)
    values = {"model_name_or_path": str(folder), "dataset_path": "none", "use_peft": True, "load_in_4bit": True}
    settings = quantization_config(config_from_dict(values).config, torch.bfloat16)
    return _load_sequence_classifier(str(folder), torch.bfloat16, None, quantization_config=settings)


@pytest.fixture(autouse=True)
def log_lines_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)


def test_4bit_experts_are_warned_about_with_their_true_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = _in_4_bits("mixtral", tmp_path / "mixtral")
    experts = expert_tensors(model)
    assert experts and {tensor.dtype for tensor in experts.values()} == {torch.bfloat16}
    assert num_weights(model.parameters()) == num_weights(tiny_classifier("mixtral").parameters())
    with caplog.at_level(logging.INFO):
        report_4bit_size(model)
    (record,) = caplog.records
    gigabytes = 2 * num_weights(experts.values()) / 1e9
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("[experts_not_quantised] 4-bit backbone: ")
    assert f"of these 55k in {gigabytes:.3g} GB are experts" in record.getMessage()


def test_a_4bit_model_without_experts_is_only_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = _in_4_bits("llama", tmp_path / "llama")
    with caplog.at_level(logging.INFO):
        report_4bit_size(model)
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("model_type", ["granite", "falcon_h1"])
def test_a_family_without_a_classifier_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key not in {"num_labels", "head_dim"}}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, "num_hidden_layers": 1}))
    model.save_pretrained(tmp_path)
    expected = rf"transformers \S+ has no sequence classifier for {model_type} models.*Fix: use a model of a family"
    with pytest.raises(ModelError, match=expected):
        _load_sequence_classifier(str(tmp_path), torch.float32, None)
