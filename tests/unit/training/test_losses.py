"""Losses against hand-checked numbers and against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from rm_scale.batching.collator import comparison_labels
from rm_scale.training.losses import LossSettings, centering, num_loss_terms, plackett_luce, preference_loss


def labels(*groups: dict[str, Any], keep_ties: bool = True) -> dict[str, torch.Tensor]:
    rows = [{"margin": None, "soft_label": None, "index": number, **group} for number, group in enumerate(groups)]
    return comparison_labels(rows, keep_ties)


def test_bradley_terry_is_the_guides_formula() -> None:
    batch = labels({"ranks": [0, 1]}, {"ranks": [1, 0]})
    rewards = torch.tensor([1.0, 0.5, -1.0, 2.0])
    expected = -logsigmoid(torch.tensor(0.5)) - logsigmoid(torch.tensor(3.0))
    assert preference_loss(rewards, batch, LossSettings()).item() == pytest.approx(expected.item())
    assert num_loss_terms(batch, LossSettings()) == 2


def test_equal_rewards_cost_log_2() -> None:
    batch = labels({"ranks": [0, 1]})
    assert preference_loss(torch.zeros(2), batch, LossSettings()).item() == pytest.approx(math.log(2))


def test_margin_asks_for_a_larger_difference() -> None:
    batch = labels({"ranks": [0, 1], "margin": 2.0})
    rewards = torch.tensor([3.0, 0.0])
    assert preference_loss(rewards, batch, LossSettings()).item() == pytest.approx(
        -logsigmoid(torch.tensor(1.0)).item()
    )


def test_soft_label_is_a_cross_entropy() -> None:
    batch = labels({"ranks": [0, 1], "soft_label": 0.25})
    rewards = torch.tensor([1.0, 0.0])
    expected = -0.25 * logsigmoid(torch.tensor(1.0)) - 0.75 * logsigmoid(torch.tensor(-1.0))
    assert preference_loss(rewards, batch, LossSettings()).item() == pytest.approx(expected.item())


def test_label_smoothing_mixes_both_directions() -> None:
    batch = labels({"ranks": [0, 1]})
    rewards = torch.tensor([1.0, 0.0])
    expected = -0.9 * logsigmoid(torch.tensor(1.0)) - 0.1 * logsigmoid(torch.tensor(-1.0))
    settings = LossSettings(label_smoothing=0.1)
    assert preference_loss(rewards, batch, settings).item() == pytest.approx(expected.item())


def test_tie_pulls_rewards_together() -> None:
    batch = labels({"ranks": [0, 0]})
    rewards = torch.tensor([2.0, 0.0], requires_grad=True)
    preference_loss(rewards, batch, LossSettings()).backward()
    assert rewards.grad is not None
    assert rewards.grad[0] > 0 > rewards.grad[1]
    assert num_loss_terms(labels({"ranks": [0, 0]}, keep_ties=False), LossSettings()) == 0


def test_group_of_four_gives_all_six_comparisons() -> None:
    batch = labels({"ranks": [2, 0, 3, 1]})
    rewards = torch.tensor([0.2, 1.0, -0.7, 0.4])
    order = [1, 3, 0, 2]
    expected = sum(-logsigmoid(rewards[order[a]] - rewards[order[b]]).item() for a in range(4) for b in range(a + 1, 4))
    assert num_loss_terms(batch, LossSettings()) == 6
    assert preference_loss(rewards, batch, LossSettings()).item() == pytest.approx(expected)


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    batch = labels({"ranks": [1, 0]}, {"ranks": [0, 1]})
    rewards = torch.tensor([0.3, 0.9, -2.0, 1.5])
    ranking = preference_loss(rewards, batch, LossSettings(kind="plackett_luce"))
    pairs = preference_loss(rewards, batch, LossSettings())
    assert ranking.item() == pytest.approx(pairs.item())
    assert num_loss_terms(batch, LossSettings(kind="plackett_luce")) == 2


def test_plackett_luce_of_three_is_the_product_of_choices() -> None:
    batch = labels({"ranks": [1, 2, 0]})
    rewards = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    weights = rewards.exp()
    probability = weights[2] / weights.sum() * weights[0] / (weights[0] + weights[1])
    loss = plackett_luce(rewards, batch["row_group"], batch["row_rank"])
    assert loss.item() == pytest.approx(-math.log(probability.item()))


def test_plackett_luce_keeps_groups_apart() -> None:
    one = labels({"ranks": [0, 1]})
    two = labels({"ranks": [0, 1]}, {"ranks": [0, 1]})
    settings = LossSettings(kind="plackett_luce")
    once = preference_loss(torch.tensor([1.0, 0.0]), one, settings)
    twice = preference_loss(torch.tensor([1.0, 0.0, 1.0, 0.0]), two, settings)
    assert twice.item() == pytest.approx(2 * once.item())


def test_centering_is_the_mean_square_of_pair_sums() -> None:
    batch = labels({"ranks": [0, 1]}, {"ranks": [0, 1]})
    rewards = torch.tensor([1.0, 0.5, 2.0, -1.0])
    assert centering(rewards, batch).item() == pytest.approx(1.5**2 + 1.0**2)


@pytest.mark.parametrize("kind", ["bradley_terry", "plackett_luce"])
def test_fillers_add_nothing_but_keep_the_graph(kind: Any) -> None:
    batch = labels({"ranks": [0, 1], "counted": False})
    rewards = torch.tensor([5.0, -5.0], requires_grad=True)
    settings = LossSettings(kind=kind)
    loss = preference_loss(rewards, batch, settings)
    loss.backward()
    assert loss.item() == 0.0
    assert num_loss_terms(batch, settings) == 0
    assert rewards.grad is not None and rewards.grad.abs().sum().item() == 0.0


def test_bfloat16_rewards_are_compared_in_fp32() -> None:
    batch = labels({"ranks": [0, 1]})
    rewards = torch.tensor([1.0, 0.0], dtype=torch.bfloat16)
    assert preference_loss(rewards, batch, LossSettings()).dtype == torch.float32
