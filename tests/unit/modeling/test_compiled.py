"""Compiled decoder layers around packed attention compute what the layers compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rm_scale.batching.collator import PackedCollator
from rm_scale.modeling.loading import _compile_layers
from rm_scale.modeling.packed_model import enable_packed_rows
from rm_scale.modeling.token_scores import batch_rewards


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_compiled_layers_give_the_same_rewards_and_gradients(tiny_model: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    enable_packed_rows(model, "matmul")
    rows = [{"input_ids": [[5, 6, 7, 8], [5, 6, 9]], "ranks": [0, 1], "index": 0} for _ in range(3)]
    results = []
    for compiled in (False, True):
        if compiled:
            _compile_layers(model)
        for count in (1, 3):  # another width: the graph must serve it too
            model.zero_grad()
            rewards = batch_rewards(model, PackedCollator(0, share_prompts=True)(rows[:count]))
            rewards.square().sum().backward()
            results.append([rewards.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]])
    for expected, given in zip(results[0] + results[1], results[2] + results[3], strict=True):
        # Compiled kernels add in another order, and in which one depends on the processor.
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
