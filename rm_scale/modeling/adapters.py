"""LoRA adapters beside a head that is trained in full, and the 4-bit backbone under them."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel

from rm_scale.config import RunConfig
from rm_scale.errors import ModelError
from rm_scale.modeling.head import HEAD_NAMES, check_head_trainable


def lora_config(config: RunConfig) -> LoraConfig:
    """PEFT's configuration. The task type is always SEQ_CLS, the only one that trains and saves the head."""
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
    except ValueError as error:
        names = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ModelError(
            f"lora_target_modules={config.lora_target_modules}: {str(error).splitlines()[0]} "
            f"Fix: choose among {', '.join(n for n in names if n not in HEAD_NAMES)}, or leave it out for all."
        ) from error
    check_head_trainable(adapted)
    return adapted


def quantization_config(config: RunConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit settings: the head is never quantised, and storage has the compute type so that ZeRO-3 can shard it."""
    storage = getattr(torch, config.bnb_4bit_quant_storage) if config.bnb_4bit_quant_storage else compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage,
        # An explicit list replaces transformers' own, which misses heads with a bias.
        llm_int8_skip_modules=[*HEAD_NAMES, "lm_head"],
    )


def keep_4bit_layout_on_cpu() -> None:
    """Stop bitsandbytes from repacking 4-bit weights in eval mode on CPUs with AVX512-BF16.

    The repacked form can't be saved any more (`packed_weight should be [N, K/2]`), so the first checkpoint after an
    evaluation would fail.
    """
    import bitsandbytes.nn.modules as modules

    if hasattr(modules, "has_avx512bf16"):
        modules.has_avx512bf16 = lambda: False
