"""Measure whether a reward model goes by length: accuracy where it helps and hurts, and the reward's slope on it.

Length is the usual shortcut of learnt rewards (Singhal et al. 2023, "A long way to go", https://arxiv.org/abs/2310.03716).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rm_scale.evaluation.evaluation_document import LengthBias, LengthBin, Share
from rm_scale.evaluation.resampling import Z95, correlation, interval_of, mean, number
from rm_scale.evaluation.scored_pairs import Floats, Integers, Mask, Pairs

NUM_BINS = 8


def length_bias(pairs: Pairs, score_std: float | None) -> LengthBias:
    """Return how accuracy and rewards depend on the lengths of the responses.

    Args:
        pairs: pairs without known lengths play no part.
        score_std: standard deviation of the scores.
    """
    known = ~np.isnan(pairs.length)
    margin, length, cluster = pairs.margin[known], pairs.length[known], pairs.cluster[known]
    longer, shorter = _share(margin, length > 0), _share(margin, length < 0)
    line = fit_line(length, margin, cluster)
    total = len(margin)
    return LengthBias(
        num_pairs=total,
        better_longer=longer,
        better_shorter=shorter,
        better_equal=_share(margin, length == 0),
        balanced_accuracy=_balanced(longer["accuracy"], shorter["accuracy"]),
        longer_wins=longer["num_pairs"] / total if total else None,
        shorter_wins=shorter["num_pairs"] / total if total else None,
        bins=length_bins(margin, length.astype(np.int64)),
        slope_per_token=line.slope if line else None,
        slope_ci95=line.slope_ci95 if line else None,
        intercept=line.intercept if line else None,
        slope_std_per_100_tokens=100 * line.slope / score_std if line and score_std else None,
        correlation=correlation(length, margin),
    )


def _balanced(longer: float | None, shorter: float | None) -> float | None:
    return (longer + shorter) / 2 if longer is not None and shorter is not None else None


def _share(margin: Floats, inside: Mask) -> Share:
    chosen = margin[inside]
    correct = int((chosen > 0).sum())
    return Share(
        num_pairs=len(chosen),
        accuracy=correct / len(chosen) if len(chosen) else None,
        accuracy_ci95=interval_of(correct, len(chosen)),
        mean_margin=mean(chosen),
    )


def length_bins(margin: Floats, length: Integers, num_bins: int = NUM_BINS) -> list[LengthBin]:
    """Return accuracy in bins of the length difference with about as many pairs each; equal ones stay together.

    Args:
        margin: `(P,)`.
        length: `(P,)` tokens of better - worse.
        num_bins: at most this many.
    """
    if not len(margin):
        return []
    # Upper ends that occur; a difference that fills several bins makes them one.
    tops = np.unique(np.quantile(length, np.arange(1, num_bins + 1) / num_bins, method="inverted_cdf"))
    place = np.searchsorted(tops, length)
    bins = []
    for index in range(len(tops)):
        inside = place == index
        low, high = int(length[inside].min()), int(length[inside].max())
        bins.append(LengthBin(low=low, high=high, **_share(margin, inside)))
    return bins


@dataclass(frozen=True)
class Line:
    """y = intercept + slope * x."""

    slope: float
    intercept: float
    slope_ci95: list[float] | None


def fit_line(x: Floats, y: Floats, cluster: Integers) -> Line | None:
    """Fit a line by least squares; the slope's interval allows for errors alike within clusters.

    The variance is the sandwich of Liang and Zeger 1986 with the usual correction for few clusters,
    C/(C-1) (n-1)/(n-2).

    Returns:
        `None` when x does not vary. The interval is `None` with fewer than three clusters.
    """
    if len(x) < 2 or x.min() == x.max():
        return None
    centred = x - x.mean()
    squares = float(centred @ centred)
    slope = float(centred @ (y - y.mean())) / squares
    intercept = float(y.mean()) - slope * float(x.mean())
    residuals = y - intercept - slope * x
    _, place = np.unique(cluster, return_inverse=True)
    scores = np.bincount(place.reshape(-1), weights=centred * residuals)
    num_clusters, count = len(scores), len(x)
    if num_clusters < 3:
        return Line(slope, intercept, None)
    correction = num_clusters / (num_clusters - 1) * (count - 1) / (count - 2)
    half = Z95 * math.sqrt(correction * float(scores @ scores)) / squares
    low, high = number(slope - half), number(slope + half)
    return Line(slope, intercept, [low, high] if low is not None and high is not None else None)
