"""What PEFT refuses is told as it is: the fix for target modules stands only where they are the cause."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ModelError
from rm_scale.modeling import adapters
from rm_scale.modeling.adapter_tensors import put_adapter_on
from rm_scale.modeling.adapters import add_adapters, describe_adapters
from rm_scale.modeling.head import install_scalar_head
from tests.support.families import FAMILIES, tiny_classifier


def _add(folder: Path, **settings: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    install_scalar_head(model)
    values = {"model_name_or_path": str(folder), "dataset_path": str(folder), "use_peft": True, **settings}
    add_adapters(model, config_from_dict(values).config, keep_dtype=False)


@pytest.mark.parametrize("names", [["nothing"], ["act_fn"]])
def test_wrong_target_modules_name_the_choices(names: list[str], tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"lora_target_modules=\[.*Fix: choose among .*q_proj"):
        _add(tiny_model, lora_target_modules=names)


@pytest.mark.parametrize(
    "error",
    [ValueError("lora.ParamWrapper does not work with lora_dropout != 0."), NotImplementedError("no DoRA here")],
)
def test_another_refusal_stands_alone(error: Exception, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*unused: object, **also_unused: object) -> SimpleNamespace:
        raise error

    monkeypatch.setattr(adapters, "get_peft_model", refuse)
    with pytest.raises(ModelError) as caught:
        _add(tiny_model)
    assert f"({type(error).__name__}: {error})" in str(caught.value)
    assert "lora_target_modules" not in str(caught.value) and "Fix" not in str(caught.value)


MIXTURES = ["deepseek_v3", "gpt_oss", "jamba", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def _adapted(model_type: str, **settings: Any) -> PeftModel:
    model = tiny_classifier(model_type)
    install_scalar_head(model)
    values = {"model_name_or_path": "tiny", "dataset_path": "none", "use_peft": True, **settings}
    return add_adapters(model, config_from_dict(values).config, keep_dtype=False)


def _adapter_names(model: PeftModel) -> set[str]:
    return {name.partition(".lora_")[0] for name in get_peft_model_state_dict(model) if ".lora_" in name}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_of_experts_just_starts_with_its_linear_layers(model_type: str) -> None:
    model = _adapted(model_type)
    names = _adapter_names(model)
    assert any("self_attn" in name for name in names)
    assert not any("experts.base_layer" in name or name.endswith((".experts", ".gate", ".router")) for name in names)
    dropouts = {module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")}
    assert dropouts == {0.05}
    assert model.peft_config["default"].lora_dropout == 0.05
    assert "not the experts" in describe_adapters(model)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_are_adapted_by_name(model_type: str, tmp_path: Path) -> None:
    """In training mode: linear layers have dropout beside experts without."""
    model = _adapted(model_type, lora_target_parameters=EXPERTS)
    experts = [name for name in _adapter_names(model) if ".experts" in name]
    assert experts and any("self_attn" in name for name in _adapter_names(model))
    dropouts = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    assert {getattr(module, "p", None) for module in dropouts} == {0.05, None}
    tokens = {"input_ids": torch.arange(3, 23).view(2, 10)}
    model.train()
    model(**tokens).logits.sum().backward()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and ".experts" in name]
    assert trained and all(p.grad is not None for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn_like(parameter))
    expected = model.eval()(**tokens).logits
    model.save_pretrained(tmp_path)
    again = tiny_classifier(model_type)
    before = again(**tokens).logits
    install_scalar_head(again)
    found = put_adapter_on(again, tmp_path).eval()(**tokens).logits
    assert torch.equal(found, expected) and not torch.allclose(found, before, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_target_parameters": ["experts.w1"]}, r"Fix: choose among experts.down_proj, experts.gate_up_proj"),
        ({"lora_target_parameters": EXPERTS, "use_dora": True}, r"use_dora=True: .*Fix: set use_dora: false"),
        ({"lora_target_modules": ["q_proj", "gate_proj"]}, r"reads gate_proj as .*Fix: leave gate_proj out, and set"),
        ({"lora_target_modules": ["q_proj", "mlp.down_proj"]}, r"Fix: leave mlp.down_proj out, and set"),
        ({"lora_target_modules": ["q_proj", "gate"]}, r"reads gate as .* of the router"),
    ],
)
def test_what_experts_can_not_have_is_refused_with_a_fix(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _adapted("qwen3_moe", **settings)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_adapter_is_trained(model_type: str) -> None:
    """One that is never called would stay as it is, and gradients averaged over ranks would wait for it."""
    model = _adapted(model_type)
    model.train()
    model.enable_input_require_grads()
    model(input_ids=torch.arange(3, 43).view(2, 20), use_cache=False).logits.sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("model_type", "layer"), [("jamba", "dt_proj"), ("zamba2", "out_proj")])
def test_an_adapter_that_would_do_nothing_is_refused(model_type: str, layer: str) -> None:
    with pytest.raises(ModelError, match=f"lora_target_modules=.*Fix: leave {layer} out"):
        _adapted(model_type, lora_target_modules=["q_proj", layer])
    assert layer not in {name.rpartition(".")[2] for name in _adapter_names(_adapted(model_type))}


def test_a_model_without_experts_has_no_tensors_to_name() -> None:
    with pytest.raises(ModelError, match=r"has no experts. Fix: leave lora_target_parameters out"):
        _adapted("llama", lora_target_parameters=EXPERTS)
