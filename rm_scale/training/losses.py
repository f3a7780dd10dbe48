"""Preference losses on scalar rewards, in fp32.

Every loss is a *sum*, and the number of its terms is counted beside it. The caller divides by the number of terms of
the whole step over all ranks, so that the result does not depend on how the batch was cut up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class LossSettings:
    """Which loss, and its options.

    Attributes:
        kind: Bradley-Terry on pairs, or Plackett-Luce on whole rankings.
        label_smoothing: assumed share of flipped labels, 0 <= e < 0.5 (Bradley-Terry only).
        center_coefficient: weight of `centering`'s mean over pairs.
        router_coefficient: weight of the routers' load-balancing loss in training (see `rm_scale.training.routing`).
    """

    kind: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"
    label_smoothing: float = 0.0
    center_coefficient: float = 0.0
    router_coefficient: float = 0.0


def num_loss_terms(batch: Mapping[str, torch.Tensor], settings: LossSettings) -> int:
    """Return how many terms `preference_loss` adds up for this batch: pairs, or ranking stages for Plackett-Luce."""
    if settings.kind == "bradley_terry":
        return int(batch["pair_better"].numel())
    return int(_stages(batch["row_group"], batch["row_rank"]).sum())


def preference_loss(rewards: torch.Tensor, batch: Mapping[str, torch.Tensor], settings: LossSettings) -> torch.Tensor:
    """Return the sum of the preference terms of a micro-batch; `centering` comes on top, with its own number of terms.

    Args:
        rewards: `(N,)`, one per response.
        batch: the collator's labels (see `rm_scale.batching.collator.PaddedCollator`).
        settings: which loss.

    Returns:
        fp32 scalar. Zero, with a graph, when the batch has nothing to compare.
    """
    rewards = rewards.float()
    total = loss_terms(rewards, batch, settings)[0].sum()
    # A batch of fillers has no terms, but ZeRO-3 still needs every parameter to take part in the backward pass.
    return total + 0.0 * rewards.sum()


def loss_terms(
    rewards: torch.Tensor, batch: Mapping[str, torch.Tensor], settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the terms that `preference_loss` adds up.

    Args:
        rewards: `(N,)` fp32.
        batch: the collator's labels.
        settings: which loss.

    Returns:
        T terms; a response that each is of, as its number; and which of them count, `(T,)` bool. The others are 0.
    """
    if settings.kind == "bradley_terry":
        terms = bradley_terry_terms(rewards, batch, settings.label_smoothing)
        return terms, batch["pair_better"], torch.ones_like(terms, dtype=torch.bool)
    terms, counted = plackett_luce_terms(rewards, batch["row_group"], batch["row_rank"])
    return terms, torch.arange(len(terms), device=terms.device), counted


def bradley_terry(
    rewards: torch.Tensor, batch: Mapping[str, torch.Tensor], label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the sum of `bradley_terry_terms`."""
    return bradley_terry_terms(rewards, batch, label_smoothing).sum()


def bradley_terry_terms(
    rewards: torch.Tensor, batch: Mapping[str, torch.Tensor], label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return -log sigmoid(r_better - r_worse - margin) of each pair, `(P,)`, with soft targets.

    With target p the term is -p log sigmoid(d) - (1 - p) log sigmoid(-d), d = r_better - r_worse - margin. A tie
    has p = 0.5 and pulls the rewards together; smoothing e turns p into p (1 - e) + (1 - p) e.
    """
    difference = rewards[batch["pair_better"]] - rewards[batch["pair_worse"]] - batch["pair_margin"]
    target = batch["pair_target"]
    if label_smoothing:
        target = target * (1.0 - label_smoothing) + (1.0 - target) * label_smoothing
    return -(target * logsigmoid(difference) + (1.0 - target) * logsigmoid(-difference))


def plackett_luce(rewards: torch.Tensor, row_group: torch.Tensor, row_rank: torch.Tensor) -> torch.Tensor:
    """Return the sum of `plackett_luce_terms`."""
    return plackett_luce_terms(rewards, row_group, row_rank)[0].sum()


def plackett_luce_terms(
    rewards: torch.Tensor, row_group: torch.Tensor, row_rank: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -log P(this response is picked first among those not ranked above it) per response, and who opens a stage.

    Responses that open no ranking stage have 0; both results are `(N,)`.

    Tied responses share one set of rivals (Breslow's rule); the last rank class has no rivals below and adds nothing.
    For K = 2 this is Bradley-Terry.

    Args:
        rewards: `(N,)` fp32.
        row_group: `(N,)` group of each response, -1 for responses that don't count.
        row_rank: `(N,)` 0 is best.
    """
    same_group = row_group[:, None] == row_group[None, :]
    not_above = row_rank[None, :] >= row_rank[:, None]
    rivals = torch.where(same_group & not_above, rewards[None, :], rewards.new_tensor(-torch.inf))
    terms = torch.logsumexp(rivals, dim=1) - rewards
    stages = _stages(row_group, row_rank)
    return torch.where(stages, terms, terms.new_zeros(())), stages


def _stages(row_group: torch.Tensor, row_rank: torch.Tensor) -> torch.Tensor:
    """Return which responses open a ranking stage, `(N,)` bool: those with at least one response ranked below."""
    below = (row_group[:, None] == row_group[None, :]) & (row_rank[None, :] > row_rank[:, None])
    return below.any(dim=1) & (row_group >= 0)


def centering(rewards: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum over pairs of (r_better + r_worse)^2, fp32: it keeps rewards near 0 (arXiv 2312.09244, eq. 2)."""
    return (rewards[batch["pair_better"]] + rewards[batch["pair_worse"]]).float().square().sum()
