"""Intervals and tests by resampling prompts, and the few numbers that every statistic needs.

The pairs of one prompt are not independent, so prompts are drawn, with all their pairs (the cluster bootstrap; Davison
and Hinkley 1997, section 3.8; Field and Welsh 2007). Prompts with the same sums are the same to a ratio of sums, so
how often each *kind* of prompt is drawn is drawn at once: exact, and quick for millions of prompts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rm_scale.evaluation.scored_pairs import Floats, Integers
from rm_scale.training.pair_counts import wilson_interval

Z95 = 1.959963984540054
"""Half-width of a 95 % interval in standard errors."""
DEFAULT_RESAMPLES = 2000
_DRAWS_AT_ONCE = 2_000_000


def number(value: Any) -> float | None:
    """Return a JSON number, or `None` for what is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None


def mean(values: Floats) -> float | None:
    """Return the mean by an exact sum, so that order can't matter; `None` without values."""
    return math.fsum(values) / len(values) if len(values) else None


def interval_of(successes: float, trials: int) -> list[float] | None:
    """Return Wilson's 95 % interval; `None` without trials."""
    return list(wilson_interval(successes, trials)) if trials else None


def per_cluster(values: Floats, cluster: Integers) -> tuple[Floats, Floats]:
    """Return sums of `values` `(P, M)` per cluster that occurs, `(C, M)`, and the rows of each, `(C,)`."""
    _, place = np.unique(cluster, return_inverse=True)
    if not len(values):
        return np.zeros((0, values.shape[1])), np.zeros(0)
    sums = [np.bincount(place, weights=column).astype(np.float64) for column in values.T]
    return np.stack(sums, axis=1), np.bincount(place).astype(np.float64)


def resampled_means(values: Floats, cluster: Integers, num_resamples: int, seed: int) -> Floats:
    """Return means of `values` over bootstrap resamples of the clusters.

    Args:
        values: `(P, M)`, M numbers per pair.
        cluster: `(P,)` the prompt of each pair.
        num_resamples: B.
        seed: the same seed gives the same draws.

    Returns:
        `(B, M)`.
    """
    sums, sizes = per_cluster(values, cluster)
    kinds, counts = np.unique(np.column_stack([sums, sizes]), axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    share = counts / counts.sum()
    step = max(1, _DRAWS_AT_ONCE // len(kinds))
    parts = []
    for start in range(0, num_resamples, step):
        draws = random.multinomial(int(counts.sum()), share, size=min(step, num_resamples - start))
        totals = draws @ kinds
        parts.append(totals[:, :-1] / totals[:, -1:])
    return np.concatenate(parts)


def accuracy_interval(credit: Floats, cluster: Integers) -> list[float] | None:
    """Return the 95 % interval of an accuracy whose pairs may be alike per prompt; `None` below two prompts.

    Wilson's interval with as many trials as the pairs are worth: their number divided by the design effect, the
    variance of the accuracy over prompts relative to that of independent pairs (Korn and Graubard 1998; Wilson's in
    place of the exact one after Franco et al. 2019). Unlike percentiles of a bootstrap it is sound near 0 and 1. It is
    never taken to be narrower than for independent pairs; where all pairs are right, or none, prompts are the trials.

    Args:
        credit: `(P,)` 1 for a correct pair, else 0.
        cluster: `(P,)` the prompt of each pair.
    """
    sums, sizes = per_cluster(credit[:, None], cluster)
    num_clusters, num_pairs = len(sizes), len(credit)
    if num_clusters < 2:
        return None
    accuracy = float(credit.mean())
    residuals = sums[:, 0] - accuracy * sizes
    variance = num_clusters / (num_clusters - 1) * float(residuals @ residuals) / num_pairs**2
    independent = accuracy * (1 - accuracy) / num_pairs
    effect = max(1.0, variance / independent) if independent > 0 else num_pairs / num_clusters
    trials = num_pairs / effect
    return list(wilson_interval(accuracy * trials, trials))


def two_sided_p_value(resampled: Floats) -> float:
    """Return the p-value of "the difference is zero" from bootstrap resamples: twice the smaller tail.

    Resamples count one more than they are on either side, so that the value is never zero (Davison and Hinkley 1997,
    section 4.2).
    """
    below = int((resampled <= 0).sum()) + 1
    above = int((resampled >= 0).sum()) + 1
    return min(1.0, 2 * min(below, above) / (len(resampled) + 1))


def ranks_of(values: Floats) -> Floats:
    """Return ranks from 0; ties get the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    ranks: Floats = (starts + (counts - 1) / 2)[place.reshape(-1)]
    return ranks


def correlation(first: Floats, second: Floats) -> float | None:
    """Return Pearson's correlation; `None` when one of them does not vary."""
    if len(first) < 2:
        return None
    a, b = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / scale)) if scale > 0 else None


def spearman(first: Floats, second: Floats) -> float | None:
    """Return Spearman's rank correlation; `None` when one of them does not vary."""
    return correlation(ranks_of(first), ranks_of(second))
