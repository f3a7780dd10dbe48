"""`lora_target_parameters` and `router_aux_loss_coef` mean the same to plan, launch, a dry run and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rm_scale import train
from rm_scale.cli import main
from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ConfigError, ModelError
from rm_scale.launch.machine import Machine
from rm_scale.launch.planned_run import plan_run
from rm_scale.modeling.adapters import add_adapters
from rm_scale.modeling.experts import expert_tensors, reason_against_router_loss
from rm_scale.modeling.head import install_scalar_head
from rm_scale.modeling.model_shape import shape_of
from rm_scale.planning.activations.activation_memory import activation_memory
from rm_scale.planning.activations.experts import adapted_in_layer
from rm_scale.planning.activations.settings import Options, Row
from rm_scale.planning.expert_settings import adapted_parameters, expert_names, no_router_loss
from rm_scale.planning.hardware import find_device
from rm_scale.planning.parameters import adapter_tensors, backbone_tensors, total
from tests.support.families import FAMILIES, tiny_classifier, tiny_config, write_causal_model

RANK = 4
ONE_LAYER = "model.layers.1.mlp.experts.gate_up_proj"
IN_ALL_LAYERS = ["gate_up_proj", "experts.gate_up_proj", "mlp.experts.gate_up_proj"]
MIXTURES = [
    name for name, values in FAMILIES.items() if {"num_experts", "num_local_experts", "n_routed_experts"} & {*values}
]


@pytest.fixture(scope="module")
def mixture(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen3-MoE of two layers or more, and a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return write_causal_model(tmp_path_factory.mktemp("mixture"), "qwen3_moe", tokenizer)


def trained_in_training(targets: list[str]) -> int:
    """Train-time adapters of the same model: parameters that need a gradient."""
    model = tiny_classifier("qwen3_moe")
    install_scalar_head(model)
    values = {"model_name_or_path": "tiny", "dataset_path": "none", "use_peft": True, "lora_r": RANK}
    config = config_from_dict({**values, "lora_target_parameters": targets}).config
    adapted = add_adapters(model, config, keep_dtype=False)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def settings(model: Path, pairs: Path, output: Path, targets: list[str]) -> list[str]:
    words = ["--model_name_or_path", str(model), "--dataset_path", str(pairs), "--output_dir", str(output)]
    words += ["--use_peft", "--lora_r", str(RANK), "--max_length", "64", "--dry_run"]
    return [*words, "--lora_target_parameters", *targets]


@pytest.mark.parametrize("name", [*IN_ALL_LAYERS, ONE_LAYER, "1.mlp.experts.gate_up_proj"])
def test_a_spelling_that_training_takes_is_planned_by_all(
    name: str, mixture: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = trained_in_training([name])
    words = ["plan", "--model", str(mixture), "--method", "lora", "--lora_r", str(RANK), "--seq", "64", "--gpus", "1"]
    main([*words, "--json", "--lora_target_parameters", name])
    assert json.loads(capsys.readouterr().out)["num_trained_parameters"] == expected
    run = settings(mixture, pairs_file, tmp_path / "out", [name])
    planned = plan_run(None, run, Machine(find_device("h100-80g"), 1, 1, None), check_output=False)
    assert planned.predicted is not None and planned.predicted.scenario.num_trained == expected
    assert train.main(run) == 0


@pytest.mark.parametrize("name", ["experts.gate_up_prj", "model.layers.99.mlp.experts.gate_up_proj", "mlp.gate.weight"])
def test_a_name_of_no_experts_is_refused_by_all_before_any_weights(
    name: str, mixture: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = rf"no tensor of experts whose name ends in {name}. Fix: choose among experts.down_proj, experts.gate_up_proj"
    with pytest.raises(ModelError, match=told):
        trained_in_training([name])
    words = ["plan", "--model", str(mixture), "--method", "lora", "--seq", "64", "--gpus", "1"]
    assert main([*words, "--lora_target_parameters", name]) == 2
    assert " ".join(told.split()) in " ".join(capsys.readouterr().err.split())
    run = settings(mixture, pairs_file, tmp_path / "out", [name])
    with pytest.raises(ConfigError, match=told):
        plan_run(None, run, Machine(find_device("h100-80g"), 1, 1, None), check_output=False)
    for words in (run, [word for word in run if word != "--dry_run"]):
        assert train.main(words) == 2
        assert f"ends in {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_router_loss_of_a_dense_model_is_refused_before_any_weights(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--max_length", "64"]
    words += ["--output_dir", str(tmp_path / "out"), "--router_aux_loss_coef", "0.01"]
    assert train.main([*words, "--dry_run"]) == 2
    assert "router_aux_loss_coef=0.01: there is no load-balancing loss" in capsys.readouterr().err
    assert train.main([*words[:-1], "0", "--dry_run"]) == 0


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_names_and_router_losses_are_those_of_the_classes(model_type: str) -> None:
    model = tiny_classifier(model_type)
    shape = shape_of(tiny_config(model_type).to_dict(), model_type)
    matrices = {name for name, parameter in expert_tensors(model).items() if parameter.dim() == 3}
    assert set(expert_names(shape)) == matrices
    assert no_router_loss(shape) == reason_against_router_loss(model)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_adapters_in_some_layers_are_counted_there(model_type: str) -> None:
    """GPT-OSS's own examples adapt the experts of a few layers, each by its number."""
    shape = shape_of(tiny_config(model_type).to_dict(), model_type)
    names = [name for name in expert_names(shape) if name.endswith("down_proj")]
    if not names:
        pytest.skip("its experts are called otherwise")
    target = names[-1].removeprefix("model.layers.")
    model = tiny_classifier(model_type)
    install_scalar_head(model)
    values: dict[str, Any] = {"model_name_or_path": "tiny", "dataset_path": "none", "use_peft": True, "lora_r": RANK}
    config = config_from_dict({**values, "lora_target_parameters": [target]}).config
    adapted = add_adapters(model, config, keep_dtype=False)
    real = sum(p.numel() for name, p in adapted.named_parameters() if ".lora_" in name)
    parameters = adapted_parameters([target], shape)
    assert real == total(adapter_tensors(backbone_tensors(shape), RANK, None, parameters))


def test_layers_are_told_apart() -> None:
    assert adapted_in_layer(["experts.down_proj", "model.layers.7.mlp.experts.gate_up_proj"], 7) == (
        "experts.down_proj",
        "experts.gate_up_proj",
    )
    assert adapted_in_layer(["model.layers.17.mlp.experts.gate_up_proj"], 7) == ()


def test_each_layer_with_adapters_keeps_a_copy_of_its_experts() -> None:
    """Without recomputation: half of the layers keep half of what all keep."""
    shape = shape_of(tiny_config("qwen3_moe", num_hidden_layers=4).to_dict(), "qwen3_moe")
    every_second = adapted_parameters(["1.mlp.experts.down_proj", "3.mlp.experts.down_proj"], shape)
    stored = [
        activation_memory(
            shape, Row(64, 64, 2, 64 * 32, 32), Options(checkpointing="none", method="lora", lora_parameters=parameters)
        ).stored_bytes
        for parameters in ((), every_second, ("experts.down_proj",))
    ]
    assert stored[2] - stored[0] == 2 * (stored[1] - stored[0]) > 0
