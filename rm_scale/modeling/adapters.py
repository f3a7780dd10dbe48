"""Add LoRA adapters to a model whose head is trained in full."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from rm_scale.config import RunConfig
from rm_scale.errors import ModelError
from rm_scale.modeling.head import HEAD_NAMES, check_head_trainable
from rm_scale.texts import first_line, one_line

_ABOUT_TARGETS = ("Target module", "target_modules", "No modules were targeted")
"""One of these is in PEFT's errors about `lora_target_modules`; its `ValueError`s have many other causes."""


def lora_config(config: RunConfig) -> LoraConfig:
    """Return PEFT's configuration. The task type is always SEQ_CLS, the only one that trains and saves the head."""
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
        modules_to_save=config.lora_modules_to_save,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        bias="none",
    )


def add_adapters(model: PreTrainedModel, config: RunConfig, keep_dtype: bool) -> PeftModel:
    """Freeze the model and put LoRA layers beside its linear layers; the head stays trainable.

    Args:
        model: sequence-classification model with a `ScalarHead`.
        config: the run's LoRA settings.
        keep_dtype: leave adapters in the backbone's type, which ZeRO-3 needs (TRL#6089); else they are fp32.

    Raises:
        ModelError: a target module does not exist, or the head would be frozen.
    """
    try:
        adapted = get_peft_model(model, lora_config(config), autocast_adapter_dtype=not keep_dtype)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(_refused(error, model, config)) from error
    check_head_trainable(adapted)
    return adapted


def _refused(error: Exception, model: PreTrainedModel, config: RunConfig) -> str:
    """Return what PEFT refused; with a fix only where target modules are the cause, since other fixes would mislead."""
    text = one_line(error, 400)
    if not any(word in text for word in _ABOUT_TARGETS):
        return f"use_peft=True: LoRA layers can't be added to {type(model).__name__} ({type(error).__name__}: {text})"
    names = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    return (
        f"lora_target_modules={config.lora_target_modules}: {first_line(error)} "
        f"Fix: choose among {', '.join(n for n in names if n not in HEAD_NAMES)}, or leave it out for all."
    )
