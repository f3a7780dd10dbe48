"""Every sequence classifier of transformers: counted by the formulas, counted on its class, or refused by name.

The three lists below are complete: a release of transformers with another classifier fails here and says which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_MODELS
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ConfigError, ModelError
from rm_scale.modeling.exact_shape import exact_shape
from rm_scale.modeling.model_shape import shape_of, shape_of_run
from rm_scale.planning.classifiers import WITHOUT_CLASSIFIER
from rm_scale.planning.parameters import backbone_tensors, count_parameters, head_tensor, total
from rm_scale.planning.plan import make_plan
from rm_scale.planning.shape import read_model_config, shape_from_config

BY_FORMULA = {
    *("arcee", "bloom", "deepseek_v2", "deepseek_v3", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text"),
    *("glm", "glm4", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "helium"),
    *("hunyuan_v1_dense", "jamba", "llama", "minicpm3", "ministral", "ministral3", "mistral", "mistral4"),
    *("mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "phimoe", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm"),
    "starcoder2",
}
WITH_A_TOWER = {"gemma3": "language_model", "qwen3_5": "language_model"}
"""Counted by formula too, without the tower for pictures that their class has; and what the rest is called in it."""

BY_CLASS = {
    *("axk1", "axk2", "biogpt", "cohere_compass_text", "ctrl", "diffllama", "doge", "hunyuan_v1_moe", "jetmoe"),
    *("minimax", "modernbert-decoder", "openai-gpt", "persimmon", "zamba", "zamba2"),
}
"""Decoders whose formulas nobody has written down: the planner counts them with --exact, training by itself."""

REFUSED = {
    *("albert", "bart", "bert", "big_bird", "bigbird_pegasus", "camembert", "canine", "convbert", "data2vec-text"),
    *("deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "esmc", "eurobert", "flaubert", "fnet"),
    *("funnel", "gte", "ibert", "jina_embeddings_v3", "layoutlm", "layoutlmv2", "layoutlmv3", "lilt"),
    *("longformer", "luke", "markuplm", "mbart", "megatron-bert", "mobilebert", "modernbert", "modernvbert"),
    *("mpnet", "mra", "mt5", "mvp", "nomic_bert", "nystromformer", "perceiver", "plbart", "reformer", "rembert"),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "t5", "t5gemma", "t5gemma2"),
    *("tapas", "ultrabert", "ultravbert", "umt5", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "yoso"),
}
"""Encoders and encoder-decoders, whose head is not one linear layer without bias; and what needs other packages."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
"""Values for those that can't be built with transformers' own defaults."""


def default_values(model_type: str) -> dict[str, Any]:
    values: dict[str, Any] = AutoConfig.for_model(model_type, **DEFAULTS.get(model_type, {})).to_dict()
    return values


def empty_model(model_type: str) -> torch.nn.Module:
    config = AutoConfig.for_model(model_type, num_labels=1, **DEFAULTS.get(model_type, {}))
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model


def test_every_classifier_of_transformers_is_in_one_list() -> None:
    lists = [BY_FORMULA, set(WITH_A_TOWER), BY_CLASS, REFUSED]
    listed = set().union(*lists)
    new, gone = sorted(CLASSIFIERS.keys() - listed), sorted(listed - CLASSIFIERS.keys())
    assert not new, f"this transformers has classifiers that no list names: {', '.join(new)}"
    assert not gone, f"this transformers has no classifier any more for {', '.join(gone)}"
    assert sum(map(len, lists)) == len(listed)


@pytest.mark.parametrize("model_type", sorted(BY_FORMULA))
def test_formulas_count_every_parameter(model_type: str) -> None:
    shape = shape_from_config(default_values(model_type))
    assert shape.left_out is None
    real = sum(parameter.numel() for parameter in empty_model(model_type).parameters())
    assert total([*backbone_tensors(shape), head_tensor(shape)]) == real


@pytest.mark.parametrize("model_type", sorted(WITH_A_TOWER))
def test_of_models_that_see_the_language_model_is_counted(model_type: str) -> None:
    shape = shape_from_config(default_values(model_type))
    part = f".{WITH_A_TOWER[model_type]}."
    real = sum(parameter.numel() for name, parameter in empty_model(model_type).named_parameters() if part in name)
    assert count_parameters(shape) == real
    assert shape.left_out is not None and "vision tower" in shape.left_out
    assert any("vision tower" in note and "left out" in note for note in shape.notes)


@pytest.mark.parametrize("model_type", sorted(BY_CLASS))
def test_other_decoders_are_counted_on_their_class(model_type: str) -> None:
    values = default_values(model_type)
    with pytest.raises(ModelError, match=rf"'{model_type}'.*--exact"):
        shape_from_config(values)
    shape = shape_of(values, "a test's model")
    real = sum(parameter.numel() for parameter in empty_model(model_type).parameters())
    assert total([*backbone_tensors(shape), head_tensor(shape)]) == real


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_no_reward_model_is_made_of_is_refused_by_name(model_type: str) -> None:
    values = default_values(model_type)
    with pytest.raises(ModelError, match=rf"'{model_type}'"):
        shape_from_config(values)
    with pytest.raises(ModelError, match=rf"{CLASSIFIERS[model_type]}|'{model_type}'"):
        exact_shape("a test's model", values=values)


def test_causal_models_without_a_classifier_are_listed() -> None:
    without = CAUSAL_MODELS.keys() - CLASSIFIERS.keys()
    assert sorted(without - WITHOUT_CLASSIFIER) == [], "causal models of this transformers that no list names"
    assert sorted(WITHOUT_CLASSIFIER - without) == [], "this transformers has a classifier for them, or knows them not"


@pytest.mark.parametrize("model_type", ["granite", "falcon_h1", "qwen3_5_moe"])
def test_a_plan_for_one_without_a_classifier_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    """By `make_plan`, with and without torch, and by `rm-scale plan`, all before anything is queued or loaded."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    parsed = config_from_dict({"model_name_or_path": str(tmp_path), "dataset_path": str(tmp_path / "config.json")})
    expected = rf"transformers \S+ has no sequence classifier for {model_type}\w* models.*Fix: use a model of a family"
    with pytest.raises(ConfigError, match=expected):
        make_plan(parsed, 1, "cpu", check_output=False)
    with pytest.raises(ConfigError, match=expected):
        make_plan(parsed, 1, "cpu", check_output=False, shape_of=shape_of_run)
    with pytest.raises(ModelError, match=expected):
        shape_of(read_model_config(str(tmp_path)), str(tmp_path), exact=True)


def test_what_transformers_has_no_classifier_for_is_refused_though_no_list_names_it() -> None:
    values = AutoConfig.for_model("qwen3_vl").to_dict()
    with pytest.raises(ModelError, match=r"'qwen3_vl'.*--exact"):
        shape_from_config(values)
    with pytest.raises(ModelError, match="has no sequence classifier for qwen3_vl"):
        shape_of(values, "a test's model")


def test_a_value_that_no_class_takes_is_named() -> None:
    with pytest.raises(ModelError, match=r"can't read what kind of model it is .*use_mem_eff_path"):
        shape_of({"model_type": "zamba2", "use_mem_eff_path": "often"}, "a test's model")
