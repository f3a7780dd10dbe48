"""A model's shape as its class has it: the formulas' tensors for every family, and what a micro-step of it takes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from rm_scale.errors import ModelError
from rm_scale.modeling.exact_shape import differences, exact_shape, shape_of_loaded
from rm_scale.modeling.model_shape import shape_of
from rm_scale.planning.activations.activation_memory import activation_memory
from rm_scale.planning.activations.settings import Options, Row
from rm_scale.planning.families import LAYER_STYLES
from rm_scale.planning.flops import attention_widths, executed_flops, linear_parameters, read_parameters
from rm_scale.planning.parameters import backbone_tensors, count_parameters, head_tensor, total
from rm_scale.planning.shape import ModelShape, is_known, shape_from_config
from tests.support.families import FAMILIES, tiny_classifier, tiny_config

WITH_FORMULAS = sorted(name for name in FAMILIES if name in LAYER_STYLES)
# Layers that carry a state cost more in torch's own code than the operations that their papers count.
PLAIN = sorted(set(WITH_FORMULAS) - {"jamba", "qwen3_5_text", "qwen3_next"})
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
    "pad_token_id": 0,
}


def values_of(model_type: str) -> dict[str, Any]:
    return tiny_config(model_type).to_dict()


def by_class(values: dict[str, Any]) -> ModelShape:
    return exact_shape("a test's model", values=values)


@pytest.mark.parametrize("model_type", WITH_FORMULAS)
def test_formulas_count_the_tensors_of_the_class(model_type: str) -> None:
    formula, found = shape_from_config(values_of(model_type)), by_class(values_of(model_type))
    assert found.exact is not None and found.exact.name == type(tiny_classifier(model_type)).__name__
    assert differences(formula, found) == []
    assert (found.hidden_size, found.num_layers) == (formula.hidden_size, formula.num_layers)
    if formula.experts is not None:
        assert found.experts is not None
        assert (found.experts.num, found.experts.chosen) == (formula.experts.num, formula.experts.chosen)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_vectors_are_what_transformers_leaves_without_weight_decay(model_type: str) -> None:
    model = tiny_classifier(model_type)
    decayed = Trainer.get_decay_parameter_names(None, model)
    free = Counter(p.numel() for name, p in model.named_parameters() if name not in decayed)
    shape = shape_of(values_of(model_type), model_type)
    vectors = Counter[int]()
    for tensor in [*backbone_tensors(shape), head_tensor(shape)]:
        vectors[tensor.numel] += tensor.count if tensor.role == "vector" else 0
    assert +vectors == free


@pytest.mark.parametrize("model_type", PLAIN)
def test_operations_of_the_class_are_those_of_the_formulas(model_type: str) -> None:
    formula, found = shape_from_config(values_of(model_type)), by_class(values_of(model_type))
    assert linear_parameters(found) == linear_parameters(formula)
    assert attention_widths(found) == attention_widths(formula)
    assert read_parameters(found, 64) == read_parameters(formula, 64)


@pytest.mark.parametrize("options", [{}, {"checkpointing": "none"}, {"method": "lora"}, {"method": "qlora"}])
@pytest.mark.parametrize(("rows", "length"), [(2, 512), (8, 2048)])
def test_activations_of_the_class_are_those_of_the_formulas(options: dict[str, Any], rows: int, length: int) -> None:
    """Small steps say what large ones take; a class that the formulas know tells how well."""
    way, row = Options(head="score_all", **options), Row(rows * length, rows * length, rows, longest=length)
    predicted = activation_memory(shape_from_config(LLAMA), row, way)
    found = activation_memory(by_class(LLAMA), row, way)
    assert found.peak_bytes == pytest.approx(predicted.peak_bytes, rel=0.05)
    assert found.stored_bytes == pytest.approx(predicted.stored_bytes, rel=0.05)
    assert sum(part.num_bytes for part in found.parts.values()) == found.peak_bytes


def test_the_gradient_of_a_large_embedding_is_the_peak() -> None:
    values, row = {**LLAMA, "vocab_size": 400_000}, Row(512, 512, 2, longest=256)
    found = activation_memory(by_class(values), row, Options(head="score_all"))
    assert found.moment == "backward: gradient of embedding"
    assert found.peak_bytes == (400_000 + 512) * 512 * 2
    formula = activation_memory(shape_from_config(values), row, Options(head="score_all"))
    assert found.peak_bytes == pytest.approx(formula.peak_bytes, rel=0.02)


def test_a_kind_without_formulas_is_counted_on_its_class() -> None:
    model = tiny_classifier("zamba2")
    values = values_of("zamba2")
    assert not is_known(values)
    with pytest.raises(ModelError, match=r"zamba2.*--exact"):
        shape_from_config(values)
    shape = shape_of(values, "a test's model")
    assert count_parameters(shape) == sum(p.numel() for p in model.parameters()) - values["hidden_size"]
    assert any("Zamba2ForSequenceClassification" in note for note in shape.notes)
    kept, recomputed = (
        activation_memory(shape, Row(1024, 1024, 2, longest=512), Options(checkpointing=how, head="score_all"))
        for how in ("none", "full")
    )
    assert recomputed.stored_bytes < kept.stored_bytes and recomputed.peak_bytes < kept.peak_bytes
    # More than the weights: the scans multiply too. Of attention there is one layer of 4 heads, 8 wide.
    assert linear_parameters(shape) > total([t for t in backbone_tensors(shape) if t.role == "linear"])
    assert attention_widths(shape) == 4 * 8
    assert executed_flops(shape, 100, 0, checkpointing=True) > executed_flops(shape, 100, 0)
    assert shape_of_loaded(model) == replace(shape, exact=shape_of_loaded(model).exact)


def test_a_shared_layer_has_an_adapter_for_each_of_its_uses() -> None:
    kinds = ["mamba", "hybrid", "hybrid"]
    values = tiny_config("zamba2", layers_block_type=kinds).to_dict()
    shared = [tensor for tensor in backbone_tensors(by_class(values)) if tensor.module == "q_proj"]
    assert [(tensor.count, tensor.num_modules) for tensor in shared] == [(1, 2)]


def test_the_class_is_taken_where_the_formulas_are_wrong(caplog: pytest.LogCaptureFixture) -> None:
    formula = shape_of(LLAMA, "a test's model", exact=True)
    assert formula.exact is None
    # attention_bias is one that Llama's formulas read; this one is another model under the same name.
    other = {**LLAMA, "attention_bias": True}
    found = by_class(other)
    wrong = differences(shape_from_config(LLAMA), found)
    assert wrong == [
        "vector tensors of 256 weights: 0 by formula, 8 in the class",
        "vector tensors of 512 weights: 9 by formula, 17 in the class",
    ]


def test_what_has_no_classifier_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="granite"):
        shape_of({"model_type": "granite", "hidden_size": 64, "vocab_size": 64}, "a test's model", exact=True)
    with pytest.raises(ModelError, match=r"'no_such_type'|no_such_type"):
        shape_of({"model_type": "no_such_type"}, "a test's model")


def test_a_class_that_needs_content_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.zamba2.modeling_zamba2 import Zamba2ForSequenceClassification

    def forward(self: torch.nn.Module, input_ids: torch.Tensor, **unused: Any) -> None:
        input_ids.max().item()  # what no fake tensor can say

    shape = by_class({**values_of("zamba2"), "vocab_size": 72})
    monkeypatch.setattr(Zamba2ForSequenceClassification, "forward", forward)
    with pytest.raises(ModelError, match=r"zamba2.*without content.*Fix:"):
        linear_parameters(shape)


def test_own_code_is_run_only_where_it_is_trusted(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    values = {**LLAMA, "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="trust_remote_code"):
        shape_of(values, str(tmp_path))
    assert not ran.exists()
    known = {**LLAMA, "auto_map": {"AutoModelForSequenceClassification": "own.Own"}}
    assert is_known(known) and not is_known(known, trust_remote_code=True)
