"""Exact pairwise statistics: sums first, ratios last, so that ranks and batch size don't matter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rm_scale.batching.collator import comparison_labels
from rm_scale.batching.group_pairs import group_pairs
from rm_scale.training.losses import LossSettings, num_loss_terms, preference_loss


@dataclass(frozen=True)
class ScoredGroup:
    """A group with the reward of each response.

    Attributes:
        rewards: K rewards.
        ranks: K ranks, 0 is best.
        margin, soft_label: as in `PreferenceGroup`.
        subset: "" when there is none.
        lengths: K lengths in tokens.
        id: the row's id in its source.
        source: the file it is from, "" when that does not matter.
        prompt: the same for groups of one prompt, "" when unknown.
        content: the same for groups with the same prompt and responses, "" when unknown.
    """

    rewards: Sequence[float]
    ranks: Sequence[int]
    margin: float | None = None
    soft_label: float | None = None
    subset: str = ""
    lengths: Sequence[int] = ()
    id: str = ""
    source: str = ""
    prompt: str = ""
    content: str = ""

    @classmethod
    def of_row(cls, row: Mapping[str, Any], rewards: Sequence[float], **origin: str) -> ScoredGroup:
        """Return the group of an encoded row; `origin` are source, prompt and content, where they are known."""
        return cls(
            rewards=rewards,
            ranks=row["ranks"],
            margin=row["margin"],
            soft_label=row["soft_label"],
            subset=row["subset"] or "",
            lengths=[len(ids) for ids in row["input_ids"]],
            id=row["id"] or "",
            **origin,
        )


@dataclass
class PairCounts:
    """Sums over pairs; add them up over batches, ranks or subsets in any order."""

    num_pairs: int = 0
    num_correct: int = 0
    num_ties: int = 0
    margin_sum: float = 0.0
    loss_sum: float = 0.0
    num_terms: int = 0

    def add(self, group: ScoredGroup, settings: LossSettings, keep_ties: bool) -> None:
        """Count one group. Pairs whose label is a tie have no right answer and only add to the loss."""
        self.add_decisions(group)
        loss, terms = _group_loss(group, settings, keep_ties)
        self.loss_sum += loss
        self.num_terms += terms

    def add_decisions(self, group: ScoredGroup) -> None:
        """Count right, wrong and tied pairs of one group, and no loss."""
        for pair in group_pairs(group.ranks, group.margin, group.soft_label, keep_ties=False):
            difference = group.rewards[pair.better] - group.rewards[pair.worse]
            self.num_pairs += 1
            self.num_correct += difference > 0
            self.num_ties += difference == 0
            self.margin_sum += difference

    def merge(self, other: PairCounts) -> None:
        """Add the sums of other groups."""
        self.num_pairs += other.num_pairs
        self.num_correct += other.num_correct
        self.num_ties += other.num_ties
        self.margin_sum += other.margin_sum
        self.loss_sum += other.loss_sum
        self.num_terms += other.num_terms

    def as_dict(self) -> dict[str, Any]:
        """Return the ratios under the names of `evaluation.json`; a tie of rewards counts as not correct."""
        return {
            "accuracy": self.num_correct / self.num_pairs if self.num_pairs else None,
            "accuracy_ci95": list(wilson_interval(self.num_correct, self.num_pairs)),
            "num_pairs": self.num_pairs,
            "num_ties": self.num_ties,
            "loss": self.loss_sum / self.num_terms if self.num_terms else None,
            "mean_margin": self.margin_sum / self.num_pairs if self.num_pairs else None,
        }


@dataclass
class EvaluationResult:
    """All counts of an evaluation, overall and per subset, and the spread of the scores.

    Attributes:
        overall: counts over all groups.
        subsets: counts per subset name; empty when no row has one.
        sources: counts per source; empty when no group says where it is from.
        score_mean, score_std: over all responses.
        num_scored: responses scored.
        longer_wins: counts of the rule "the longer response is better", over the same pairs.
        groups: the groups themselves, in the data set's order.
    """

    overall: PairCounts = field(default_factory=PairCounts)
    subsets: dict[str, PairCounts] = field(default_factory=dict)
    sources: dict[str, PairCounts] = field(default_factory=dict)
    score_mean: float = math.nan
    score_std: float = math.nan
    num_scored: int = 0
    longer_wins: PairCounts = field(default_factory=PairCounts)
    groups: list[ScoredGroup] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`."""
        longer = self.longer_wins
        shorter = longer.num_pairs - longer.num_correct - longer.num_ties
        return {
            **self.overall.as_dict(),
            "subsets": {name: counts.as_dict() for name, counts in sorted(self.subsets.items())},
            **({"sources": self._of_sources()} if self.sources else {}),
            "score_mean": self.score_mean,
            "score_std": self.score_std,
            "num_scored": self.num_scored,
            "baselines": {
                "longer_wins": longer.num_correct / longer.num_pairs if longer.num_pairs else None,
                "shorter_wins": shorter / longer.num_pairs if longer.num_pairs else None,
                "equal_length": longer.num_ties,
            },
        }

    def _of_sources(self) -> dict[str, Any]:
        return {name: counts.as_dict() for name, counts in sorted(self.sources.items())}


def evaluate_groups(groups: Iterable[ScoredGroup], settings: LossSettings, keep_ties: bool = True) -> EvaluationResult:
    """Count everything over scored groups, in float64."""
    result = EvaluationResult()
    rewards: list[float] = []
    for group in groups:
        result.groups.append(group)
        counts = PairCounts()
        counts.add(group, settings, keep_ties)
        result.overall.merge(counts)
        for name, parts in ((group.subset, result.subsets), (group.source, result.sources)):
            if name:
                parts.setdefault(name, PairCounts()).merge(counts)
        if group.lengths:
            by_length = ScoredGroup([float(n) for n in group.lengths], group.ranks, None, group.soft_label)
            result.longer_wins.add_decisions(by_length)
        rewards += group.rewards
    if rewards:
        # fsum makes the sums independent of the order in which ranks delivered the groups.
        result.num_scored = len(rewards)
        result.score_mean = math.fsum(rewards) / len(rewards)
        squares = math.fsum((reward - result.score_mean) ** 2 for reward in rewards)
        result.score_std = math.sqrt(squares / len(rewards))
    return result


def _group_loss(group: ScoredGroup, settings: LossSettings, keep_ties: bool) -> tuple[float, int]:
    row = {"ranks": list(group.ranks), "index": 0}
    labels = comparison_labels([{**row, "margin": group.margin, "soft_label": group.soft_label}], keep_ties)
    rewards = torch.tensor(list(group.rewards), dtype=torch.float32)
    return float(preference_loss(rewards, labels, settings)), num_loss_terms(labels, settings)


def wilson_interval(successes: float, trials: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion (Wilson 1927); `(0, 1)` without trials.

    Args:
        successes: a count; with soft labels a sum of probabilities.
        trials: how many, or how many independent ones they are worth.
        z: half-width in standard errors.
    """
    if trials == 0:
        return (0.0, 1.0)
    p = successes / trials
    denominator = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / denominator
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / denominator
    return (max(0.0, centre - half), min(1.0, centre + half))
