"""Parameters counted from config.json alone are those of transformers' classes, tensor by tensor."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rm_scale.known_models import KNOWN_MODELS
from rm_scale.planning.families import LAYER_STYLES
from rm_scale.planning.parameters import (
    active_parameters,
    adapter_tensors,
    backbone_tensors,
    count_parameters,
    each,
    head_tensor,
    total,
)
from rm_scale.planning.shape import shape_from_config

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
}
COMPARED = sorted(LAYER_STYLES.keys() - {"falcon", "bloom", "mpt", "gptj"})
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 2}}
"""What these types have no default for."""


def real_model(model_type: str, **changes: object) -> torch.nn.Module:
    config = AutoConfig.for_model(model_type, num_labels=1, pad_token_id=0, **NEEDED.get(model_type, {}))
    for name, value in {**SIZES, **changes}.items():
        if hasattr(config, name) or name in changes:
            setattr(config, name, value)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("model_type", COMPARED)
def test_every_tensor_is_counted(model_type: str) -> None:
    model = real_model(model_type)
    shape = shape_from_config(model.config.to_dict())
    real = Counter(parameter.numel() for parameter in model.parameters())
    assert Counter(each([*backbone_tensors(shape), head_tensor(shape)])) == real
    assert count_parameters(shape) == sum(size * count for size, count in real.items()) - 64


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {"attention_bias": True}), ("llama", {"mlp_bias": True}), ("starcoder2", {"use_bias": False})],
)
def test_biases_follow_the_config(model_type: str, changes: dict[str, object]) -> None:
    model = real_model(model_type, **changes)
    shape = shape_from_config(model.config.to_dict())
    assert total([*backbone_tensors(shape), head_tensor(shape)]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "phi"])
def test_adapters_are_those_that_peft_makes(model_type: str) -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    model = real_model(model_type)
    shape = shape_from_config(model.config.to_dict())
    adapted = get_peft_model(
        model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules="all-linear"), low_cpu_mem_usage=True
    )
    real = Counter(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert Counter(each(adapter_tensors(backbone_tensors(shape), 4, None))) == real


def test_only_the_targets_are_adapted() -> None:
    shape = shape_from_config(real_model("llama").config.to_dict())
    adapters = adapter_tensors(backbone_tensors(shape), 8, ["q_proj", "v_proj"])
    assert total(adapters) == 3 * 8 * ((64 + 64) + (64 + 32))


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 30.53, 3.35),
        ("Qwen/Qwen3-235B-A22B", 235.09, 22.19),
        ("openai/gpt-oss-20b", 20.91, 3.61),
        ("openai/gpt-oss-120b", 116.83, 5.13),
        ("mistralai/Mixtral-8x7B-v0.1", 46.70, 12.88),
        ("deepseek-ai/DeepSeek-V3", 671.03, 37.55),
    ],
)
def test_known_mixtures_have_the_published_parameters(name: str, billions: float, active: float) -> None:
    """Their model cards count the language model's head too; OpenAI's leave its weights out of the active ones."""
    shape = shape_from_config(KNOWN_MODELS[name])
    head = shape.vocab_size * shape.hidden_size
    assert (count_parameters(shape) + head) / 1e9 == pytest.approx(billions, abs=0.01)
    at_work = active_parameters(shape) + (0 if "gpt-oss" in name else head)
    assert at_work / 1e9 == pytest.approx(active, abs=0.01)
