"""Compare two models on the same pairs: do they agree, and is one better?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rm_scale.errors import DataError
from rm_scale.evaluation.evaluation_document import Agreement, Comparison
from rm_scale.evaluation.resampling import DEFAULT_RESAMPLES, resampled_means, spearman, two_sided_p_value
from rm_scale.evaluation.scored_pairs import Floats, Pairs, pairs_of
from rm_scale.training.pair_counts import ScoredGroup


@dataclass(frozen=True)
class Matched:
    """The groups that two models have both scored, in the same order.

    Attributes:
        first, second: pairs with each model's margins; all else is the same in both.
        first_rewards, second_rewards: of all their responses.
        num_left_out: groups that one of them only has scored.
    """

    first: Pairs
    second: Pairs
    first_rewards: Floats
    second_rewards: Floats
    num_left_out: int


def match(first: Sequence[ScoredGroup], second: Sequence[ScoredGroup], names: tuple[str, str]) -> Matched:
    """Find the groups of the second model that are the first one's.

    Groups are recognised by what they say (`ScoredGroup.content`) when all of both have that, else by source id. The
    n-th occurrence is matched with the n-th.

    Raises:
        DataError: they have no group in common, or the same id stands for different labels.
    """
    by_content = all(group.content for group in [*first, *second])
    left, right = _keyed(first, by_content), _keyed(second, by_content)
    common = [key for key in left if key in right]
    how = "text" if by_content else "id"
    if not common:
        raise DataError(
            f"{names[0]} and {names[1]}: no group of one is among those of the other (by {how}), so they can't be "
            "compared. Fix: evaluate both on the same --dataset_path."
        )
    for key in common:
        if (list(left[key].ranks), left[key].soft_label) != (list(right[key].ranks), right[key].soft_label):
            raise DataError(
                f"{names[0]} and {names[1]}: group {left[key].id or key[0]} has labels {list(left[key].ranks)} in one "
                f"and {list(right[key].ranks)} in the other. Fix: evaluate both on the same --dataset_path."
            )
    ours, theirs = [left[key] for key in common], [right[key] for key in common]
    return Matched(
        pairs_of(ours),
        pairs_of(theirs),
        np.asarray([reward for group in ours for reward in group.rewards], dtype=np.float64),
        np.asarray([reward for group in theirs for reward in group.rewards], dtype=np.float64),
        len(first) + len(second) - 2 * len(common),
    )


def _keyed(groups: Sequence[ScoredGroup], by_content: bool) -> dict[tuple[str, str, int], ScoredGroup]:
    seen: dict[tuple[str, str], int] = {}
    keyed = {}
    for place, group in enumerate(groups):
        name = (group.content, "") if by_content else (group.id or str(place), group.subset)
        seen[name] = seen.get(name, 0) + 1
        keyed[(*name, seen[name])] = group
    return keyed


# --- Agreement -----------------------------------------------------------------------------------------------------


def agreement(matched: Matched, first: str, second: str) -> Agreement:
    """Return how alike two models decide and score.

    Args:
        matched: both models' pairs.
        first, second: their names.
    """
    a, b = np.sign(matched.first.margin), np.sign(matched.second.margin)
    total = len(a)
    return Agreement(
        first=first,
        second=second,
        num_pairs=total,
        agreement=float((a == b).mean()) if total else None,
        kappa=cohens_kappa(a, b),
        both_correct=int(((a > 0) & (b > 0)).sum()),
        first_only=int(((a > 0) & (b <= 0)).sum()),
        second_only=int(((a <= 0) & (b > 0)).sum()),
        neither=int(((a <= 0) & (b <= 0)).sum()),
        spearman_scores=spearman(matched.first_rewards, matched.second_rewards),
        spearman_margins=spearman(matched.first.margin, matched.second.margin),
    )


def cohens_kappa(first: Floats, second: Floats) -> float | None:
    """Return (agreement - chance) / (1 - chance) (Cohen 1960); `None` where chance alone always agrees."""
    if not len(first):
        return None
    categories = np.union1d(first, second)
    chance = sum(float((first == c).mean()) * float((second == c).mean()) for c in categories)
    if chance >= 1:
        return None
    return (float((first == second).mean()) - chance) / (1 - chance)


# --- Comparison ----------------------------------------------------------------------------------------------------


def compare(
    matched: Matched, first: str, second: str, num_resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> Comparison:
    """Test whether the first model's accuracy is higher. Paired: both models see the same resampled prompts.

    Args:
        matched: both models' pairs.
        first, second: their names.
        num_resamples, seed: of the bootstrap.
    """
    ours, theirs = matched.first.credit, matched.second.credit
    cluster = matched.first.cluster
    num_prompts = len(np.unique(cluster))
    result = Comparison(
        first=first,
        second=second,
        num_pairs=len(ours),
        num_prompts=num_prompts,
        num_groups_left_out=matched.num_left_out,
        accuracy_first=float(ours.mean()) if len(ours) else None,
        accuracy_second=float(theirs.mean()) if len(ours) else None,
        accuracy_difference=float((ours - theirs).mean()) if len(ours) else None,
        accuracy_difference_ci95=None,
        p_value=None,
        mcnemar_p_value=mcnemar_exact(int((ours > theirs).sum()), int((ours < theirs).sum())),
        num_resamples=num_resamples,
        verdict="undecided",
    )
    if num_prompts >= 2:
        differences = resampled_means((ours - theirs)[:, None], cluster, num_resamples, seed)[:, 0]
        low, high = (float(value) for value in np.quantile(differences, [0.025, 0.975]))
        result["accuracy_difference_ci95"] = [low, high]
        p_value = result["p_value"] = two_sided_p_value(differences)
        if p_value < 0.05:
            result["verdict"] = "first" if float((ours - theirs).mean()) > 0 else "second"
    return result


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """Return the two-sided exact p-value of "a pair that one model alone gets right is as likely either's".

    Twice the smaller tail of the binomial distribution with p = 1/2 (McNemar 1947), at most 1.

    Args:
        first_only, second_only: pairs that only this model gets right.
    """
    total, fewer = first_only + second_only, min(first_only, second_only)
    if 2 * fewer >= total:
        return 1.0
    # From the largest term down, in logarithms: the binomials of millions of pairs are no floats.
    log_term = math.lgamma(total + 1) - math.lgamma(fewer + 1) - math.lgamma(total - fewer + 1) - total * math.log(2)
    ratio, tail = 1.0, 1.0
    for k in range(fewer, 0, -1):
        ratio *= k / (total - k + 1)
        tail += ratio
        if ratio < 1e-17 * tail:
            break
    return min(1.0, 2 * math.exp(log_term + math.log(tail)))
