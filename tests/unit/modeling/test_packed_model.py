"""Packed rows give the rewards and gradients of padded ones, for each architecture that gets them by default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AttentionInterface, AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rm_scale.batching.collator import Batch, PackedCollator, PaddedCollator
from rm_scale.batching.packed import attention, recurrence
from rm_scale.batching.packed.attention import PREFIX, register_backends
from rm_scale.batching.packed.attention_rules import AttentionRules
from rm_scale.batching.packed.layout import GroupSpan, RowLayout
from rm_scale.errors import ModelError
from rm_scale.modeling import packed_model, recurrent_layers
from rm_scale.modeling.head import install_scalar_head
from rm_scale.modeling.packed_model import TakesPackedRows, enable_packed_rows, packed_backend
from rm_scale.modeling.token_scores import batch_rewards
from rm_scale.planning.layout_choice import TESTED_MODEL_TYPES, TESTED_RECURRENT_TYPES
from tests.support.families import FAMILIES, tiny_classifier
from tests.support.marks import mostly_long

WITH_WINDOW = sorted(name for name in TESTED_MODEL_TYPES if FAMILIES.get(name, {}).get("sliding_window"))
# Else every segment would be one chunk of a scan, and all of it empty but for a few tokens.
SMALL_CHUNKS = {"zamba2": {"chunk_size": 8}}
RECURRENT = sorted(TESTED_RECURRENT_TYPES)
FORKED = ["qwen3_5_text", "qwen3_next", "zamba2"]


def tiny(model_type: str, **extra: Any) -> PreTrainedModel:
    """A model with random weights that is as long as it takes to tell layers, heads, experts and windows apart."""
    model = tiny_classifier(model_type, **{**SMALL_CHUNKS.get(model_type, {}), **extra}).eval()
    # Fresh models are so even that attention hardly matters: larger weights make mistakes visible.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() in {2, 3} and "embed" not in name:
                parameter.normal_(std=0.2)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    install_scalar_head(model)
    # Its scans multiply rounding errors.
    return model.double() if model_type == "zamba" else model


def adversarial_groups() -> list[dict[str, Any]]:
    """Groups that are easy to get wrong; lengths on both sides of the window."""
    torch.manual_seed(1)

    def some(count: int) -> list[int]:
        return torch.randint(3, 64, (count,)).tolist()

    prompt, start = some(17), some(4)
    base = some(5)
    sequences = [
        [prompt + some(9), prompt + some(1)],
        [some(3), some(11)],
        [prompt[:8] + start + some(4), prompt[:8] + start + some(13)],
        [[*some(2), number] for number in (5, 6)],
        [prompt + base, prompt + base + some(3), prompt + base + some(1), prompt + some(2), prompt + base + some(8)],
        [[7], [9], [7]],
        [[*prompt[:5], number] for number in range(10, 15)],
    ]
    return [
        {
            "input_ids": responses,
            "ranks": list(range(len(responses))),
            "margin": None,
            "soft_label": None,
            "index": number,
        }
        for number, responses in enumerate(sequences)
    ]


GROUPS = adversarial_groups()


def rewards_and_gradients(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients of a loss that weighs each response differently."""
    model.zero_grad()
    rewards = batch_rewards(model, batch)
    weights = torch.linspace(-1, 1, len(rewards)).roll(3)
    (torch.tanh(rewards) * weights).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    return rewards.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]], wanted: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    # Gradients that are 0 but for rounding (such as those of key biases) are measured by the largest.
    floor = 1e-6 * max(float(gradient.norm()) for gradient in wanted[1].values())
    off = {}
    for name, gradient in wanted[1].items():
        distance = float((found[1][name] - gradient).norm())
        if distance > 1e-4 * float(gradient.norm()) + floor:
            off[name] = distance / float(gradient.norm())
    assert not off, f"relative distance of gradients: {off}"


@pytest.mark.parametrize("model_type", sorted(TESTED_MODEL_TYPES))
def test_packed_rows_give_what_padded_rows_give(model_type: str) -> None:
    model = tiny(model_type)
    kind, names = type(model), list(model.state_dict())
    padded = PaddedCollator(pad_token_id=0)(GROUPS)
    wanted = rewards_and_gradients(model, padded)
    assert float(wanted[0].std()) > 0.1

    enable_packed_rows(model, "matmul")
    for share_prompts in (True, False):
        for multiple in (1, 64):
            packed = PackedCollator(pad_token_id=0, share_prompts=share_prompts, pad_to_multiple_of=multiple)(GROUPS)
            assert_same(rewards_and_gradients(model, packed), wanted)

    assert_same(rewards_and_gradients(model, padded), wanted)
    assert type(model).__name__ == kind.__name__ and type(model).__module__ == kind.__module__
    assert isinstance(model, kind)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("model_type", WITH_WINDOW)
def test_windows_of_these_models_matter(model_type: str) -> None:
    """Else the test above would not show that they are kept."""
    windowed = tiny(model_type)
    free = tiny(model_type, sliding_window=1000)
    padded = PaddedCollator(pad_token_id=0)(GROUPS)
    with torch.no_grad():
        difference = (batch_rewards(windowed, padded) - batch_rewards(free, padded)).abs().max()
    assert float(difference) > 1e-3


@pytest.mark.parametrize("width", [4, 20])
@pytest.mark.parametrize("model_type", ["gemma2", "llama", "mistral"])
def test_padded_rows_of_one_length_stay_the_same(model_type: str, width: int) -> None:
    """transformers leaves masks out where it thinks that nothing needs one; `width` is on both sides of the window."""
    torch.manual_seed(2)
    group = {**GROUPS[0], "input_ids": torch.randint(3, 64, (2, width)).tolist()}
    model = tiny(model_type)
    padded = PaddedCollator(pad_token_id=0)([group])
    wanted = rewards_and_gradients(model, padded)
    enable_packed_rows(model, "matmul")
    assert_same(rewards_and_gradients(model, padded), wanted)


def test_soft_cap_of_gemma2_matters() -> None:
    padded = PaddedCollator(pad_token_id=0)(GROUPS)
    with torch.no_grad():
        capped = batch_rewards(tiny("gemma2"), padded)
        free = batch_rewards(tiny("gemma2", attn_logit_softcapping=None), padded)
    assert float((capped - free).abs().max()) > 1e-3


def test_sinks_of_gpt_oss_matter() -> None:
    model = tiny("gpt_oss")
    padded = PaddedCollator(pad_token_id=0)(GROUPS)
    with torch.no_grad():
        sunk = batch_rewards(model, padded)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-torch.inf)
        free = batch_rewards(model, padded)
    assert float((sunk - free).abs().max()) > 1e-3


def packed_rewards(model: PreTrainedModel, share_prompts: bool = True) -> torch.Tensor:
    with torch.no_grad():
        return batch_rewards(model, PackedCollator(pad_token_id=0, share_prompts=share_prompts)(GROUPS))


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [(name, "window") for name in WITH_WINDOW] + [("gemma2", "softcap"), ("gpt_oss", "sinks")],
)
def test_a_rule_left_out_is_noticed(model_type: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(model_type)
    enable_packed_rows(model, "matmul")
    wanted = packed_rewards(model)
    monkeypatch.setattr(attention, "AttentionRules", lambda *given: replace(AttentionRules(*given), **{rule: None}))
    assert float((packed_rewards(model) - wanted).abs().max()) > 1e-3


def without_reset(scan: recurrence.Scan, inputs: list[torch.Tensor], layout: RowLayout) -> torch.Tensor:
    """Run on through the whole row."""
    return scan(list(inputs), None, False)[0]


def without_prompts(layout: RowLayout) -> RowLayout:
    """Begin anew at every prompt and every response."""
    spans: list[GroupSpan] = []
    for span in layout.spans:
        starts = [(span.start, span.start + span.prompt_length)] if span.prompt_length else []
        spans += [GroupSpan(start, 0, (end - start,)) for start, end in starts + span.responses()]
    return RowLayout(tuple(spans), layout.width)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_a_state_that_runs_on_is_noticed(model_type: str, share_prompts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(model_type)
    enable_packed_rows(model, "matmul")
    wanted = packed_rewards(model, share_prompts)
    for name in ("forked_scan", "repeated_scan"):
        monkeypatch.setattr(recurrent_layers, name, without_reset)
    assert float((packed_rewards(model, share_prompts) - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_a_convolution_that_runs_on_is_noticed(
    model_type: str, share_prompts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(model_type)
    enable_packed_rows(model, "matmul")
    wanted = packed_rewards(model, share_prompts)
    monkeypatch.setattr(recurrent_layers, "segment_convolution", lambda convolve, inputs, *_: convolve(inputs))
    assert float((packed_rewards(model, share_prompts) - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("function", ["scan", "convolution"])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_responses_that_forget_their_prompt_are_noticed(
    model_type: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reset, but not forked."""
    model = tiny(model_type)
    enable_packed_rows(model, "matmul")
    wanted = packed_rewards(model)
    names = ("forked_scan", "repeated_scan") if function == "scan" else ("segment_convolution",)
    for name in names:
        right = getattr(recurrence, name)
        monkeypatch.setattr(
            recurrent_layers, name, lambda *given, right=right: right(*given[:-1], without_prompts(given[-1]))
        )
    assert float((packed_rewards(model) - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("model_type", RECURRENT)
def test_segments_of_all_lengths_give_the_same(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of segments up to 2, 4, 8 and 16 tokens, where long rows have 64, 128, ..."""
    model = tiny(model_type)
    wanted = rewards_and_gradients(model, PaddedCollator(pad_token_id=0)(GROUPS))
    enable_packed_rows(model, "matmul")
    monkeypatch.setattr(recurrence, "SHORTEST_BATCH", 2)
    packed = PackedCollator(pad_token_id=0, share_prompts=True, pad_to_multiple_of=64)(GROUPS)
    assert_same(rewards_and_gradients(model, packed), wanted)


@pytest.mark.parametrize("model_type", FORKED)
def test_a_prompt_is_computed_once(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scans' own tokens: each of the row, and none twice."""
    model = tiny(model_type)
    enable_packed_rows(model, "matmul")
    packed = PackedCollator(pad_token_id=0, share_prompts=True)(GROUPS)
    found: list[list[int]] = []
    forked = recurrence.forked_scan

    def watched(scan: recurrence.Scan, inputs: list[torch.Tensor], layout: RowLayout) -> torch.Tensor:
        output = forked(scan, inputs, layout)
        index = layout.derived["forked segments", output.device]
        tokens = torch.cat([batch.tokens.flatten() for batch in [*index.prompts, *index.responses]])
        found.append(sorted(tokens[tokens < layout.width].tolist()))
        return output

    monkeypatch.setattr(recurrent_layers, "forked_scan", watched)
    with torch.no_grad():
        batch_rewards(model, packed)
    assert len(found) >= 2 and all(tokens == list(range(packed["packed_layout"].num_tokens)) for tokens in found)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "gpt_oss", "llama", "mistral", "qwen3", "qwen3_next"])
def test_sdpa_gives_the_same(model_type: str) -> None:
    model = tiny(model_type)
    wanted = rewards_and_gradients(model, PaddedCollator(pad_token_id=0)(GROUPS))
    enable_packed_rows(model, "sdpa")
    packed = PackedCollator(pad_token_id=0, share_prompts=True, pad_to_multiple_of=64)(GROUPS)
    assert_same(rewards_and_gradients(model, packed), wanted)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("model_type", ["gpt_oss", "jamba", "llama", "nemotron", "qwen3_next", "zamba2"])
def test_gradient_checkpointing_gives_the_same(model_type: str, share_prompts: bool, use_reentrant: bool) -> None:
    model = tiny(model_type, attention_dropout=0.0)
    wanted = rewards_and_gradients(model, PaddedCollator(pad_token_id=0)(GROUPS))
    enable_packed_rows(model, "matmul")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    # Layers are only checkpointed in training mode; these models have no dropout.
    model.train()
    packed = PackedCollator(pad_token_id=0, share_prompts=share_prompts)(GROUPS)
    assert_same(rewards_and_gradients(model, packed), wanted)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model_type", mostly_long(["gpt_oss", "jamba", "nemotron", "qwen3_5_text"], ["gpt_oss"]))
def test_compiled_layers_give_the_same(model_type: str) -> None:
    """Traced as in training, and run by torch itself: padded rows and packed ones through the same layers."""
    model = tiny(model_type)
    batches = [
        PaddedCollator(pad_token_id=0)(GROUPS),
        PackedCollator(pad_token_id=0, share_prompts=True)(GROUPS),
        PackedCollator(pad_token_id=0, share_prompts=True)(GROUPS[2:]),
    ]
    enable_packed_rows(model, "matmul")
    wanted = [rewards_and_gradients(model, batch) for batch in batches]
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend="eager")
    for batch, expected in zip(batches, wanted, strict=True):
        assert_same(rewards_and_gradients(model, batch), expected)


def test_enabling_twice_is_enabling_once() -> None:
    model = tiny("llama")
    enable_packed_rows(model, "matmul")
    kind = type(model)
    enable_packed_rows(model, "sdpa")
    assert type(model) is kind
    assert sum(base is TakesPackedRows for base in kind.__mro__) == 1


def test_groups_do_not_depend_on_their_neighbours() -> None:
    model = tiny("gemma2")
    enable_packed_rows(model, "matmul")
    collate = PackedCollator(pad_token_id=0, share_prompts=True)
    with torch.no_grad():
        together = batch_rewards(model, collate(GROUPS))
        alone = torch.cat([batch_rewards(model, collate([group])) for group in GROUPS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_attention_outside_transformers_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the class, where the type is not known."""
    monkeypatch.setattr(packed_model, "refusal", lambda config: None)
    config = AutoConfig.for_model(
        "gptj", vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, num_labels=1, pad_token_id=0
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ModelError, match=r"GPTJForSequenceClassification: its attention does not go through .* none"):
        enable_packed_rows(model, "matmul")


def test_a_layout_that_does_not_reach_attention_is_an_error() -> None:
    """A model that swallows unknown arguments would attend to the whole row, and nobody would know."""
    register_backends()
    attention = AttentionInterface()[PREFIX + "matmul"]
    query = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ModelError, match="Linear was given a packed row without its layout"):
        attention(torch.nn.Linear(1, 1), query, query, query, torch.ones(1, 1, 1, 1, dtype=torch.bool))


def test_the_backend_of_a_model_is_known_beside_adapters_too() -> None:
    model = tiny("llama")
    assert packed_backend(model) is None
    enable_packed_rows(model, "matmul")
    assert packed_backend(model) == "matmul"
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_proj"]))
    assert packed_backend(adapted) == "matmul"
