"""Packed rows give the rewards and gradients of padded ones, for each architecture that gets them by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rm_scale.batching.collator import Batch, PackedCollator, PaddedCollator
from rm_scale.batching.packed.attention import PREFIX, register_backends
from rm_scale.errors import ModelError
from rm_scale.modeling.head import install_scalar_head
from rm_scale.modeling.packed_model import TakesPackedRows, enable_packed_rows
from rm_scale.modeling.token_scores import batch_rewards
from rm_scale.planning.layout_choice import TESTED_MODEL_TYPES

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
FULL_AND_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
EXTRAS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "sliding_window": WINDOW,
        "layer_types": FULL_AND_SLIDING,
        "query_pre_attn_scalar": 8,
        # Low enough to bend the scores of so small a model.
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": FULL_AND_SLIDING, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "starcoder2": {"sliding_window": WINDOW},
}
WITH_WINDOW = sorted(EXTRAS)


def tiny(model_type: str, **extra: Any) -> PreTrainedModel:
    """A model with random weights that is as long as it takes to tell layers, heads and windows apart."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **{**EXTRAS.get(model_type, {}), **extra})
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    # Fresh models are so even that attention hardly matters: larger weights make mistakes visible.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.normal_(std=0.2)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    install_scalar_head(model)
    return model


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


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_sdpa_gives_the_same(model_type: str) -> None:
    model = tiny(model_type)
    wanted = rewards_and_gradients(model, PaddedCollator(pad_token_id=0)(GROUPS))
    enable_packed_rows(model, "sdpa")
    packed = PackedCollator(pad_token_id=0, share_prompts=True, pad_to_multiple_of=64)(GROUPS)
    assert_same(rewards_and_gradients(model, packed), wanted)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("share_prompts", [True, False])
def test_gradient_checkpointing_gives_the_same(share_prompts: bool, use_reentrant: bool) -> None:
    model = tiny("llama")
    wanted = rewards_and_gradients(model, PaddedCollator(pad_token_id=0)(GROUPS))
    enable_packed_rows(model, "matmul")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    # Layers are only checkpointed in training mode; this model has no dropout.
    model.train()
    packed = PackedCollator(pad_token_id=0, share_prompts=share_prompts)(GROUPS)
    assert_same(rewards_and_gradients(model, packed), wanted)


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


def test_attention_outside_transformers_interface_is_refused() -> None:
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
