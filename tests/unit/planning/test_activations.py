"""Predicted activation memory and operations against torch's own count, at real widths with few layers."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.activation_cases import MODELS, Case, all_cases
from benchmarks.activation_counts import measure, measure_allocator
from benchmarks.activations import predict, predict_flops
from rm_scale.errors import ModelError
from rm_scale.planning.activations.activation_memory import activation_memory, activations_of
from rm_scale.planning.activations.settings import Options, Row
from rm_scale.planning.families import LAYER_STYLES
from rm_scale.planning.shape import shape_from_config
from tests.support.families import FAMILIES, RARE_FAMILIES

SHARED = {"prompt": 1536, "response": 256, "shares": True}
TRACKED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Llama-3.2-1B", {"checkpointing": "none"}, {}),
    ("Llama-3.2-1B", {}, {"prompt": 3072, "response": 1024}),
    ("Llama-2-7B", {"use_reentrant": True}, {}),
    ("Llama-2-13B", {"method": "lora"}, {}),
    ("Llama-3.1-8B", {"method": "lora", "lora_dropout": 0.05}, SHARED),
    ("Llama-3.1-8B", {"method": "lora", "checkpointing": "none"}, {}),
    ("Llama-3.1-8B", {"method": "lora", "use_reentrant": True}, {}),
    ("Llama-3.1-8B", {"method": "lora", "precision": "amp"}, {}),
    ("Llama-3.1-8B", {"precision": "amp", "checkpointing": "none"}, {}),
    ("Llama-2-7B", {"precision": "amp"}, {}),
    ("Llama-2-7B", {"method": "qlora", "lora_dropout": 0.05}, {}),
    ("Qwen2.5-7B", {"checkpointing": "none"}, SHARED),
    ("Llama-3.2-1B", {"precision": "fp32", "attention": "sdpa", "checkpointing": "none"}, {}),
    ("Llama-3.2-1B", {"attention": "matmul", "checkpointing": "none"}, SHARED),
    ("Llama-2-7B", {"head": "score_all", "checkpointing": "none"}, {}),
    ("Llama-2-7B", {"head": "lm"}, {}),
    ("Qwen3-4B", {"checkpointing": "none"}, {}),
    ("Gemma-2-2B", {"checkpointing": "none"}, {}),
    ("StarCoder2-3B", {"checkpointing": "none"}, {}),
    ("OLMo-2-7B", {}, {}),
    ("Phi-3-mini", {"method": "lora"}, {}),
]


@pytest.mark.parametrize(("model", "options", "row"), TRACKED)
def test_memory_and_operations_are_what_torch_counts(model: str, options: dict[str, Any], row: dict[str, Any]) -> None:
    case = Case(model, Options(**options), num_layers=3, **row)
    measured, predicted = measure(case), predict(case)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.02)
    assert predicted.stored_bytes == pytest.approx(measured.stored_bytes, rel=0.02)
    if case.options.attention != "matmul" and case.options.head != "lm":
        assert predict_flops(case) == pytest.approx(sum(measured.flops.values()), rel=0.01)


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
SHORT = {"prompt": 160, "response": 70, "num_layers": 4}
OTHER_PARTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Qwen3-30B-A3B", {"checkpointing": "none"}, {}),
    ("Qwen3-30B-A3B", {"method": "lora"}, {}),
    ("Qwen3-30B-A3B", {"method": "lora", "lora_parameters": EXPERTS}, {}),
    ("Qwen3-30B-A3B", {"method": "lora", "lora_parameters": EXPERTS, "checkpointing": "none"}, {}),
    ("Qwen3-30B-A3B", {"method": "lora", "lora_parameters": EXPERTS[:1], "lora_dropout": 0.05}, {}),
    ("GPT-OSS-20B", {"method": "lora", "lora_parameters": EXPERTS, "checkpointing": "none", "attention": "matmul"}, {}),
    ("Qwen1.5-MoE-A2.7B", {"method": "lora", "checkpointing": "none"}, {}),
    ("DeepSeek-V3", {"checkpointing": "none"}, {"num_layers": 4}),
    ("DeepSeek-V3", {"method": "lora"}, {"num_layers": 4}),
    ("GPT-OSS-20B", {"checkpointing": "none", "attention": "matmul"}, {}),
    ("GPT-OSS-20B", {"checkpointing": "none", "method": "lora", "attention": "matmul"}, {}),
    ("Qwen3.5-9B", {"checkpointing": "none", "head": "score_all"}, SHORT),
    ("Qwen3.5-9B", {"method": "lora", "head": "score_all"}, SHORT),
    ("Qwen3.5-9B", {"checkpointing": "none", "method": "lora", "precision": "amp", "head": "score_all"}, SHORT),
    ("Qwen3-Next-80B-A3B", {"checkpointing": "none", "method": "lora", "head": "score_all"}, SHORT),
    ("Qwen3-Next-80B-A3B", {"head": "score_all"}, SHORT),
]


@pytest.mark.parametrize(("model", "options", "row"), OTHER_PARTS)
def test_memory_of_experts_latent_attention_delta_nets_and_sinks(
    model: str, options: dict[str, Any], row: dict[str, Any]
) -> None:
    case = Case(model, Options(**options), **{"num_layers": 2, **row})
    measured, predicted = measure(case), predict(case)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)
    assert predicted.stored_bytes == pytest.approx(measured.stored_bytes, rel=0.03)
    if case.options.lora_parameters and case.options.attention != "matmul":
        assert predict_flops(case) == pytest.approx(sum(measured.flops.values()), rel=0.001)


def test_a_delta_net_keeps_a_state_per_chunk() -> None:
    # Each further chunk of a sequence saves a state of key_dim x value_dim per head, in fp32.
    shape = replace(shape_from_config(MODELS["Qwen3.5-9B"]), num_layers=3)
    memory = activation_memory(shape, Row(640, 640, 1), Options(checkpointing="none", method="lora", head="score_all"))
    states = sum(part.num_bytes for name, part in memory.parts.items() if name.startswith("delta state"))
    assert states == 3 * 10 * 32 * 128 * 128 * 4


@pytest.mark.parametrize("options", [{}, {"checkpointing": "none", "method": "lora"}])
def test_real_steps_allocate_what_is_predicted(options: dict[str, Any]) -> None:
    settings = Options(precision="fp32", attention="matmul", **options)
    case = Case("Llama-3.2-1B", settings, 96, 96, num_layers=2, vocab_size=1000)
    assert predict(case, as_tracked=False).peak_bytes == pytest.approx(measure_allocator(case), rel=0.01)


def test_a_layer_of_llama_2_by_hand() -> None:
    # Per token and layer in bf16: two norms keep their input in fp32 and their output before and after the weight (8 h
    # each), attention keeps q, k, v and its output (2 h each) and a logarithm per head, the MLP gate, its activation,
    # up and their product (2 x 11008 each), and each norm an inverse root: 45.5 h.
    shape, row = shape_from_config(MODELS["Llama-2-7B"]), Row(4096, 4096, 2)
    by_hand = 2 * 8 * 4096 + 4 * 2 * 4096 + 4 * 32 + 4 * 2 * 11008 + 2 * 4
    layers = [
        activation_memory(replace(shape, num_layers=count), row, Options(checkpointing="none")).stored_bytes
        for count in (3, 4)
    ]
    assert layers[1] - layers[0] == 4096 * by_hand
    assert by_hand / 4096 == pytest.approx(45.5, abs=0.1)


def test_checkpointing_keeps_one_hidden_state_per_layer() -> None:
    shape, row = shape_from_config(MODELS["Llama-2-7B"]), Row(4096, 4096, 2)
    layers = [activation_memory(replace(shape, num_layers=count), row).stored_bytes for count in (3, 4)]
    assert layers[1] - layers[0] == 4096 * 2 * 4096


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", ["bf16", "amp", "fp32"])
@pytest.mark.parametrize("head", ["score", "score_all", "lm", "lm_chunked"])
def test_more_tokens_need_more(method: Any, checkpointing: Any, precision: Any, head: Any) -> None:
    shape = replace(shape_from_config(MODELS["Llama-3.2-1B"]), num_layers=3)
    options = Options(method=method, checkpointing=checkpointing, precision=precision, head=head)
    rows = [Row(tokens, tokens, 2) for tokens in (64, 512, 4096, 16384)]
    found = [activation_memory(shape, row, options) for row in rows]
    for less, more in itertools.pairwise(found):
        assert less.peak_bytes <= more.peak_bytes
        assert less.stored_bytes < more.stored_bytes
    assert found[0].peak_bytes < found[-1].peak_bytes
    for memory in found:
        assert sum(part.num_bytes for part in memory.parts.values()) == memory.peak_bytes
        assert memory.transient_bytes + memory.stored_bytes == memory.peak_bytes


def config_of_llama_s_size(model_type: str) -> dict[str, Any]:
    known = {**FAMILIES, **RARE_FAMILIES, "mistral4": FAMILIES["deepseek_v3"]}.get(model_type, {})
    return {**known, **MODELS["Llama-3.2-1B"], "model_type": model_type, "vocab_size": 1000}


def test_mamba_layers_are_refused_by_name() -> None:
    shape = shape_from_config(config_of_llama_s_size("jamba"))
    with pytest.raises(ModelError, match=r"jamba: activation memory of Mamba layers .* --exact"):
        activation_memory(shape, Row(64, 64, 2))


@pytest.mark.parametrize("model_type", sorted(set(LAYER_STYLES) - {"jamba"}))
def test_checkpointing_needs_less_whatever_the_layer(model_type: str) -> None:
    shape, row = shape_from_config(config_of_llama_s_size(model_type)), Row(4096, 4096, 2)
    without = activation_memory(shape, row, Options(checkpointing="none"))
    assert activation_memory(shape, row).peak_bytes < without.peak_bytes / 4


def test_adapters_and_dropout() -> None:
    shape, row = shape_from_config(MODELS["Llama-3.1-8B"]), Row(4096, 4096, 2)
    full = activation_memory(shape, row, Options(checkpointing="none"))
    lora = Options(checkpointing="none", method="lora", lora_rank=16)
    few = replace(lora, lora_targets=("q_proj", "v_proj"))
    dropout = replace(lora, lora_dropout=0.1)
    peaks = [activation_memory(shape, row, options).peak_bytes for options in (few, lora, dropout)]
    assert peaks == sorted(peaks)
    assert peaks[1] < full.peak_bytes < peaks[2]


def test_the_kernel_s_workspace_is_counted_for_a_device() -> None:
    # With prompts shared by many responses attention's backward pass becomes the worst moment.
    row = Row.of([(4096, [32] * 32)], share_prompts=True)
    options = Options(method="lora")
    shape = replace(shape_from_config(MODELS["Llama-3.1-8B"]), num_layers=2)
    tracked = activation_memory(shape, row, replace(options, as_tracked=True))
    device = activation_memory(shape, row, options)
    assert device.peak_bytes > tracked.peak_bytes
    assert "key and value gradients inside the kernel" in device.parts


def test_rows() -> None:
    groups = [(100, [20, 30]), (7, [5])]
    assert Row.of(groups, share_prompts=True).tokens == 100 + 50 + 12
    assert Row.of(groups, share_prompts=True).key_tokens == 120 + 130 + 12
    apart = Row.of(groups, share_prompts=False, multiple=64)
    assert apart.tokens == apart.key_tokens == 320
    assert (apart.responses, apart.longest) == (3, 130)
    # Up to a few hundred tokens one block holds a sequence's queries, each with all its keys.
    assert Row.of([(100, [20])], share_prompts=False).pairs == 120 * 120
    assert Row.of([(100, [20])], share_prompts=True).pairs == 100 * 100 + 20 * 120


def test_of_a_scenario() -> None:
    shape = shape_from_config(MODELS["Llama-2-7B"])
    load = SimpleNamespace(
        tokens=1000.0, squared=4e5, effective_tokens=1600.0, effective_squared=1e6, groups=2.0, responses=4.0
    )
    scenario: Any = SimpleNamespace(
        shape=shape,
        load=load,
        largest_tokens=2000.0,
        checkpointing=True,
        method="lora",
        zero_stage=3,
        lora_rank=8,
        lora_targets=None,
        lora_parameters=(),
        lora_dropout=0.0,
        precision="bf16",
        attention="varlen",
        head="score",
        packed=True,
    )
    row = Row(2000, 3200, 8, pairs=400_000, longest=625)
    assert activations_of(scenario) == activation_memory(
        shape, row, Options(method="lora", lora_rank=8, use_reentrant=True)
    )


def test_it_explains_itself() -> None:
    shape, row = shape_from_config(MODELS["Llama-2-7B"]), Row(4096, 4096, 2)
    text = activation_memory(shape, row, Options(checkpointing="none")).explain()
    assert "stored   gate_proj: 32 x tokens x mlp x 2 B" in text


def test_the_benchmark_s_cases_have_different_names() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names) > 80


def test_no_torch_is_imported() -> None:
    modules = "rm_scale.planning.activations.activation_memory, rm_scale.planning.flops"
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
