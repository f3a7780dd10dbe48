"""What PEFT refuses is told as it is: the fix for target modules stands only where they are the cause."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ModelError
from rm_scale.modeling import adapters
from rm_scale.modeling.adapters import add_adapters
from rm_scale.modeling.head import install_scalar_head


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
