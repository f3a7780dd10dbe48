"""Tiny models of every family of decoders that transformers offers as a sequence classifier.

Sizes are as small as still tells the parts of a family apart: several layers of each kind, fewer key than query heads,
windows shorter than the rows that tests make, more experts than are chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

WINDOW = 6
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 1,
}
_FULL_AND_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_LINEAR_AND_FULL = ["linear_attention", "full_attention", "linear_attention"]
_GATED_DELTA_NET: dict[str, Any] = {
    "layer_types": _LINEAR_AND_FULL,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "arcee": {},
    "bloom": {},
    "deepseek_v2": {**_LATENT_ATTENTION, **_ROUTED, "head_dim": 8},
    "deepseek_v3": {**_LATENT_ATTENTION, **_ROUTED},
    "exaone4": {"sliding_window": WINDOW, "layer_types": _FULL_AND_SLIDING},
    "falcon": {},
    "gemma": {},
    "gemma2": {
        "sliding_window": WINDOW,
        "layer_types": _FULL_AND_SLIDING,
        "query_pre_attn_scalar": 8,
        # Low enough to bend the scores of so small a model.
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": _FULL_AND_SLIDING, "query_pre_attn_scalar": 8},
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": _FULL_AND_SLIDING,
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
    },
    "llama": {},
    "ministral": {"sliding_window": WINDOW, "layer_types": _FULL_AND_SLIDING},
    "ministral3": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": _FULL_AND_SLIDING},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3_moe": _EXPERTS,
    "qwen3_5_text": _GATED_DELTA_NET,
    "qwen3_next": {**_GATED_DELTA_NET, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": WINDOW},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "adapter_rank": 4,
        "use_mem_rope": True,
    },
}
"""What each family needs beside `SIZES`, by transformers' model type."""

RARE_FAMILIES: dict[str, dict[str, Any]] = {
    "axk1": {**_LATENT_ATTENTION, **_ROUTED},
    "doge": {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "kv_channels": 8},
    "minicpm3": _LATENT_ATTENTION,
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "head_dim": 16,
        "mamba_d_state": 4,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
    },
}
"""The same for some that few tests take."""

_TOWER: dict[str, Any] = {"hidden_size": 16, "patch_size": 4}
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16}
WITH_A_TOWER: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": "gemma3_text", "vision_config": {**_TOWER, **_LAYERS}, "mm_tokens_per_image": 4},
    "qwen3_5": {
        "text_config": "qwen3_5_text",
        "vision_config": {**_TOWER, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16},
    },
    "mistral3": {
        "text_config": "ministral3",
        "vision_config": {**_TOWER, **_LAYERS, "model_type": "pixtral", "head_dim": 8},
    },
}
"""Models that see, and the family of the language model in each."""

_HEADS = ("head_dim", "num_key_value_heads")
_NOT_KNOWN_TO = {
    "bloom": (*_HEADS, "intermediate_size"),
    "falcon": (*_HEADS, "intermediate_size"),
    "gpt2": (*_HEADS, "intermediate_size"),
    "gpt_neox": _HEADS,
}
"""Sizes that follow from others in older families."""


def tiny_config(model_type: str, **extra: Any) -> PreTrainedConfig:
    """Return the config of a tiny model of this family; `extra` changes single values."""
    values = {**SIZES, **FAMILIES.get(model_type, RARE_FAMILIES.get(model_type, {})), **extra}
    for name in _NOT_KNOWN_TO.get(model_type, ()):
        values.pop(name, None)
    return AutoConfig.for_model(model_type, **values)


def tiny_classifier(model_type: str, **extra: Any) -> PreTrainedModel:
    """Return a tiny classifier of this family with random fp32 weights, always the same."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_config(model_type, **extra), dtype=torch.float32)


def write_causal_model(folder: Path, model_type: str, tokenizer: PreTrainedTokenizerBase, **extra: Any) -> Path:
    """Write a tiny causal language model of this family with a tokenizer, as a user would bring it; fp32, no head."""
    config = _config_for(model_type, tokenizer, **extra)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config_for(model_type: str, tokenizer: PreTrainedTokenizerBase, **extra: Any) -> PreTrainedConfig:
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    # At this width the libraries' 0.02 would let a layer hardly change its input.
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "initializer_range": 0.14, "num_labels": 2}
    return tiny_config(model_type, **{**ids, **sizes, **extra})


def write_model_that_sees(
    folder: Path, model_type: str, tokenizer: PreTrainedTokenizerBase, scalar_head: bool = False
) -> Path:
    """Write a tiny model with a tower for pictures, fp32: to generate text, or a classifier with one output."""
    values = WITH_A_TOWER[model_type]
    text = _config_for(values["text_config"], tokenizer, num_labels=1)
    config = AutoConfig.for_model(model_type, **{**values, "text_config": text.to_dict()}, num_labels=1)
    torch.manual_seed(0)
    kind: Any = AutoModelForSequenceClassification if scalar_head else AutoModelForImageTextToText
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
