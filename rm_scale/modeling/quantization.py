"""QLoRA's 4-bit backbone: bitsandbytes settings, and what is kept out of quantisation: the head above all."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from rm_scale.config import RunConfig
from rm_scale.logs import get_logger
from rm_scale.modeling.experts import expert_tensors, num_weights
from rm_scale.modeling.head import HEAD_NAMES
from rm_scale.texts import large_number

logger = get_logger(__name__)

NEVER_QUANTIZED = (*HEAD_NAMES, "lm_head")
"""Modules that stay in full precision, by name. An explicit list replaces transformers' own, which misses heads with a
bias."""


def quantization_config(config: RunConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the 4-bit settings of a run. The head is never quantised.

    Args:
        config: the run's `bnb_` settings.
        compute_dtype: type of the matrix products, and of the storage unless that is set: ZeRO-3 shards tensors of the
            compute type alone.
    """
    storage = getattr(torch, config.bnb_4bit_quant_storage) if config.bnb_4bit_quant_storage else compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=list(NEVER_QUANTIZED),
    )


def saved_quantization_config(settings: dict[str, Any]) -> BitsAndBytesConfig:
    """Return the 4-bit settings that an adapter was trained on, from its scoring contract."""
    return BitsAndBytesConfig(**settings)


def keep_4bit_layout_on_cpu() -> None:
    """Stop bitsandbytes from repacking 4-bit weights in eval mode on CPUs with AVX512-BF16.

    The repacked form can't be saved any more (`packed_weight should be [N, K/2]`), so the first checkpoint after an
    evaluation would fail.
    """
    import bitsandbytes.nn.modules as modules

    if hasattr(modules, "has_avx512bf16"):
        modules.has_avx512bf16 = lambda: False


def copy_from_mapped_files(model: PreTrainedModel) -> None:
    """Copy the parameters that were not quantised out of the memory-mapped files.

    A few norms and embeddings that still point there keep all of the files mapped, and a process would seem to hold
    the unquantised model: 13 GB more for 7B. Parameters that ZeRO-3 shards are copies already.
    """
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.device.type == "cpu" and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.clone()


def report_4bit_size(model: torch.nn.Module) -> None:
    """Log what a 4-bit model takes; warn of experts, which bitsandbytes leaves as they are."""
    parameters = list(model.parameters())
    quantised = [parameter for parameter in parameters if getattr(parameter, "quant_state", None) is not None]
    rest = [parameter for parameter in parameters if getattr(parameter, "quant_state", None) is None]
    experts = [parameter for parameter in expert_tensors(model).values() if parameter in set(rest)]
    text = (
        f"4-bit backbone: {large_number(num_weights(quantised))} weights in {_gigabytes(quantised)}, "
        f"{large_number(num_weights(rest))} that stay as they are in {_gigabytes(rest)}"
    )
    if not experts:
        logger.info(text)
        return
    logger.warning(
        f"[experts_not_quantised] {text}: of these {large_number(num_weights(experts))} in {_gigabytes(experts)} are "
        "experts. bitsandbytes quantises linear layers, and transformers holds experts as 3-D tensors; so 4 bits save "
        "little here, and memory must hold the experts whole. ZeRO-3 shards them over the GPUs."
    )


def _gigabytes(parameters: list[torch.nn.Parameter]) -> str:
    """Return the bytes of parameters, with the constants of 4-bit ones."""
    total = 0
    for parameter in parameters:
        total += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            nested = state.state2
            total += state.absmax.nbytes + (nested.absmax.nbytes if nested is not None else 0)
    return f"{total / 1e9:.3g} GB"
