"""Which layout a run gets, and every refusal with its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ConfigError
from rm_scale.planning import layout_choice
from rm_scale.planning.layout_choice import choose_packing, packing_problems, refusal
from rm_scale.planning.plan import Plan, fit_budget, make_plan
from tests.support.families import tiny_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}


def make(tmp_path: Path, model: dict[str, Any], device: str = "cpu", world: int = 2, **settings: Any) -> Plan:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model))
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    values = {"model_name_or_path": str(folder), "dataset_path": str(tmp_path / "pairs.jsonl")}
    return make_plan(config_from_dict(values | {"output_dir": str(tmp_path / "out")} | settings), world, device)


def problem(tmp_path: Path, model: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, model, **settings)
    return str(caught.value)


def test_default_is_the_fastest_layout_that_is_exact(tmp_path: Path) -> None:
    made = make(tmp_path, LLAMA, per_device_train_batch_size=4, max_length=512)
    assert (made.packing, made.max_tokens_per_device) == ("prefix_shared", 4096)
    assert "packing not given: prefix_shared, the fastest layout for this model" in made.notes
    assert "8 groups per step, prefix_shared rows of up to 4,096 tokens on each of 2 ranks" in made.summary()


@pytest.mark.parametrize(
    ("model", "settings", "note"),
    [
        ({"model_type": "bloom"}, {}, "adds a bias by distance in the row (ALiBi)"),
        ({"attention_dropout": 0.1}, {"disable_dropout": False}, "packed attention has no dropout"),
        ({}, {"attn_implementation": "eager"}, "attn_implementation=eager was asked for"),
    ],
)
def test_default_falls_back_to_padded_rows_and_says_why(
    tmp_path: Path, model: dict[str, Any], settings: dict[str, Any], note: str
) -> None:
    made = make(tmp_path, {**LLAMA, **model}, **settings)
    assert (made.packing, made.max_tokens_per_device) == ("none", None)
    assert any(note in given for given in made.notes), made.notes


@pytest.mark.parametrize(
    ("model", "settings", "text"),
    [
        ({"model_type": "mpt"}, {}, "packing=prefix_shared with mpt: its attention adds a bias"),
        ({"model_type": "axk2"}, {}, "an index chooses the keys"),
        ({"model_type": "bamba"}, {}, "a state runs along the row"),
        ({"layer_types": ["linear_attention", "full_attention"]}, {}, "layers of kind linear_attention"),
        ({"attention_dropout": 0.1}, {"disable_dropout": False}, "Fix: set disable_dropout: true or packing: none"),
        ({}, {"attn_implementation": "sdpa"}, "packed rows have attention of their own"),
    ],
)
def test_what_cant_be_packed_is_refused_by_name(
    tmp_path: Path, model: dict[str, Any], settings: dict[str, Any], text: str
) -> None:
    assert text in problem(tmp_path, {**LLAMA, **model}, packing="prefix_shared", **settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"packing": "none", "max_tokens_per_device": 512}, "padded rows are sized by per_device_train_batch_size"),
        ({"packing": "none", "packed_attention": "sdpa"}, "packed_attention=sdpa with packing=none"),
        ({"use_liger_kernel": True}, "Liger's kernels are written for GPUs"),
        ({"torch_compile": True, "deepspeed": "zero3"}, "a compiled layer would pass by"),
        ({"torch_compile": True, "use_peft": True, "load_in_4bit": True}, "4-bit layers break the graph"),
        ({"padding_side": "left"}, "rows are padded on the right"),
    ],
)
def test_settings_that_dont_go_together(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    assert text in problem(tmp_path, LLAMA, **settings)


def test_global_batch_need_not_be_divisible(tmp_path: Path) -> None:
    assert make(tmp_path, LLAMA, world=4, global_batch_size=9).global_batch_size == 9


def test_budget_is_raised_to_the_longest_group_only_when_not_given(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 1, "max_length": 64, "pad_to_multiple_of": 8}
    config = config_from_dict({"model_name_or_path": "x", "dataset_path": "y", **settings}).config
    made = make(tmp_path, LLAMA, **settings)
    raised = fit_budget(made, config, 201)
    assert raised.max_tokens_per_device == 208
    assert "max_tokens_per_device not given: 208, the longest group" in raised.notes
    given = config_from_dict(
        {"model_name_or_path": "x", "dataset_path": "y", **settings, "max_tokens_per_device": 205}
    ).config
    asked = make(tmp_path, LLAMA, **settings, max_tokens_per_device=205)
    assert fit_budget(asked, given, 200).max_tokens_per_device == 200
    with pytest.raises(ConfigError, match=r"the longest group has 201 tokens in a prefix_shared row .* 208 or more"):
        fit_budget(asked, given, 201)


def test_nothing_is_wrong_with_plain_models() -> None:
    assert refusal(LLAMA) is None
    config = config_from_dict({"model_name_or_path": "x", "dataset_path": "y", "packing": "none"}).config
    assert choose_packing(config, LLAMA) == ("none", None)


def test_untested_architectures_are_refused_by_name_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_choice, "TESTED_MODEL_TYPES", frozenset({"gemma"}))
    text = problem(tmp_path, LLAMA, packing="prefix_shared")
    assert "packing=prefix_shared: llama models are not tested with packed rows" in text
    assert "--force packing" in text
    assert make(tmp_path, LLAMA, packing="prefix_shared", force=["packing"]).packing == "prefix_shared"
    made = make(tmp_path, LLAMA)
    assert made.packing == "none"
    assert any("llama models are not tested with packed rows" in note for note in made.notes)


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "gpt_oss", "mixtral", "olmo3", "phimoe", "qwen3_5_text", "qwen3_moe", "qwen3_next"]
)
def test_mixtures_sinks_and_states_get_shared_prompts(model_type: str) -> None:
    values = {"model_name_or_path": "x", "dataset_path": "y"}
    config = config_from_dict(values).config
    asked = config_from_dict(values | {"packing": "prefix_shared"}).config
    model = tiny_config(model_type).to_dict()
    assert choose_packing(config, model)[0] == "prefix_shared"
    assert packing_problems(asked, model) == []


def test_settings_of_packed_rows_are_not_lost_when_rows_are_padded(tmp_path: Path) -> None:
    text = problem(tmp_path, LLAMA, attn_implementation="eager", max_tokens_per_device=32, packed_attention="sdpa")
    assert "max_tokens_per_device=32, packed_attention=sdpa: belongs to packed rows, but none, since" in text


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 256}, 256),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 128}}, 128),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 512}, 512),
    ],
)
def test_frequencies_that_depend_on_neighbours_are_refused(tmp_path: Path, rope: dict[str, Any], limit: int) -> None:
    model = {**LLAMA, "max_position_embeddings": 4096, **rope}
    text = problem(tmp_path, {**model, "max_position_embeddings": max(limit, 512)}, max_length=limit + 1)
    assert f"max_length={limit + 1}: beyond {limit} positions this model changes its rotary frequencies" in text
    assert f"Fix: --max_length {limit} or less" in text
    assert make(tmp_path, model, max_length=limit).packing == "prefix_shared"
    assert make(tmp_path, {**model, "max_position_embeddings": 4096}, max_length=limit, force=["rope"])


@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_gpu_backends_are_refused_on_a_cpu_before_anything_is_read(tmp_path: Path, backend: str) -> None:
    assert f"packed_attention={backend} on cpu" in problem(tmp_path, LLAMA, packed_attention=backend)
