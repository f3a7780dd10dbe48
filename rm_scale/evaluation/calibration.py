"""Measure calibration (ECE): do rewards mean what Bradley-Terry says, P(a is better than b) = sigmoid(r_a - r_b)?

A prediction is turned to the response that the model prefers: its probability is sigmoid(|margin|), between 0.5 and
1, and it comes true when the label agrees. Expected calibration error and temperature as in Guo et al. 2017, "On
calibration of modern neural networks" (https://arxiv.org/abs/1706.04599).
"""

from __future__ import annotations

import math

import numpy as np

from rm_scale.evaluation.evaluation_document import Calibration, ReliabilityBin
from rm_scale.evaluation.resampling import interval_of, number
from rm_scale.evaluation.scored_pairs import Floats, Integers, Pairs

NUM_BINS = 10
MAX_FOLDS = 5
# Inverse temperatures beyond these are no temperatures any more: all predictions are 0.5, or 1.
_LEAST, _MOST = 1e-6, 1e6
NO_INFORMATION = (
    "rewards carry no information about the labels, or point the wrong way: no temperature is better than 0.5"
)
SEPARABLE = "every pair is right: the smaller the temperature, the better the fit, without end"
NO_PAIRS = "no pairs"


def calibration(pairs: Pairs, seed: int = 0) -> Calibration:
    """Return reliability, its error (ECE), and what one temperature would do for it.

    Args:
        pairs: the pairs; label ties among them play no part.
        seed: of the folds of the cross-validation.
    """
    predicted, observed = _predictions(pairs.margin, pairs.target)
    bins = reliability_bins(predicted, observed)
    inverse, note = fit_inverse_temperature(pairs.margin, pairs.target)
    scaled, fold_temperatures = _cross_validated(pairs, seed)
    result = Calibration(
        bins=bins,
        bins_after=[],
        ece=expected_calibration_error(bins),
        ece_if_calibrated=_error_if_calibrated(predicted, pairs.target),
        nll=negative_log_likelihood(pairs.margin, pairs.target),
        temperature=None if note else 1 / inverse,
        temperature_note=note,
        ece_after=None,
        nll_after=None,
        num_folds=len(fold_temperatures),
        fold_temperatures=fold_temperatures,
    )
    if scaled is not None:
        result["bins_after"] = reliability_bins(*_predictions(scaled, pairs.target))
        result["ece_after"] = expected_calibration_error(result["bins_after"])
        result["nll_after"] = negative_log_likelihood(scaled, pairs.target)
    return result


def sigmoid(values: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(values))
    result: Floats = np.where(values >= 0, 1 / (1 + small), small / (1 + small))
    return result


def negative_log_likelihood(margin: Floats, target: Floats) -> float | None:
    """Return the mean over pairs of -p log sigmoid(m) - (1 - p) log sigmoid(-m), in nats; `None` without pairs."""
    if not len(margin):
        return None
    return number(np.mean(target * np.logaddexp(0, -margin) + (1 - target) * np.logaddexp(0, margin)))


def _predictions(margin: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Return the probability of the response the model prefers, and by label that it is the better one."""
    observed = np.where(margin > 0, target, np.where(margin < 0, 1 - target, 0.5))
    return sigmoid(np.abs(margin)), observed


# --- Reliability ---------------------------------------------------------------------------------------------------


def reliability_bins(predicted: Floats, observed: Floats, num_bins: int = NUM_BINS) -> list[ReliabilityBin]:
    """Put the pairs into bins of equal width from 0.5 to 1.

    Args:
        predicted: `(P,)` in [0.5, 1].
        observed: `(P,)` in [0, 1].
        num_bins: how many.
    """
    place = _bin_of(predicted, num_bins)
    bins = []
    for index in range(num_bins):
        inside = place == index
        count = int(inside.sum())
        hits = math.fsum(observed[inside])
        bins.append(
            ReliabilityBin(
                low=0.5 + 0.5 * index / num_bins,
                high=0.5 + 0.5 * (index + 1) / num_bins,
                count=count,
                predicted=math.fsum(predicted[inside]) / count if count else None,
                observed=hits / count if count else None,
                observed_ci95=interval_of(hits, count),
            )
        )
    return bins


def _bin_of(predicted: Floats, num_bins: int) -> Integers:
    return np.minimum(((predicted - 0.5) * 2 * num_bins).astype(np.int64), num_bins - 1)


def expected_calibration_error(bins: list[ReliabilityBin]) -> float | None:
    """Return the ECE: the mean over pairs of |predicted - observed| of their bin; `None` without pairs."""
    total = sum(part["count"] for part in bins)
    gaps = [
        part["count"] * abs(part["predicted"] - part["observed"])
        for part in bins
        if part["predicted"] is not None and part["observed"] is not None
    ]
    return math.fsum(gaps) / total if total else None


def _error_if_calibrated(predicted: Floats, target: Floats, num_bins: int = NUM_BINS) -> float | None:
    """Return the mean error if every prediction were right: chance alone leaves a gap in each bin.

    The gap of a bin is then about normal with mean 0, so its absolute value has mean sqrt(2 / pi) standard deviations.
    Only hard labels are drawn; a soft label is itself a probability and brings no chance with it.
    """
    if not len(predicted):
        return None
    variance = np.where(target == 1, predicted * (1 - predicted), 0.0)
    sums = np.bincount(_bin_of(predicted, num_bins), weights=variance, minlength=num_bins)
    return float(np.sqrt(2 / np.pi) * np.sqrt(sums).sum() / len(predicted))


# --- Temperature ---------------------------------------------------------------------------------------------------


def fit_inverse_temperature(margin: Floats, target: Floats) -> tuple[float, str]:
    """Return the factor on rewards that makes the labels likeliest (least negative log-likelihood).

    The likelihood is log-concave in it, so the root of its derivative is found by halving, in the logarithm.

    Returns:
        1 / temperature, and "" or why there is no temperature; the number then lies at the end of what is possible.
    """
    if not len(margin):
        return 1.0, NO_PAIRS

    def slope(inverse: float) -> float:
        return float(np.sum(margin * (sigmoid(inverse * margin) - target)))

    if slope(_LEAST) >= 0:
        return _LEAST, NO_INFORMATION
    if slope(_MOST) < 0 or not _has_conflict(margin, target):
        return _MOST, SEPARABLE
    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp((low + high) / 2), ""


def _has_conflict(margin: Floats, target: Floats) -> bool:
    """Tell whether there is anything that certainty would contradict."""
    return bool(np.any((margin < 0) | ((margin > 0) & (target < 1))))


def _cross_validated(pairs: Pairs, seed: int) -> tuple[Floats | None, list[float | None]]:
    """Return margins divided by temperatures fitted on other prompts, and those; `None` with a single prompt."""
    prompts, cluster = np.unique(pairs.cluster, return_inverse=True)
    num_folds = min(MAX_FOLDS, len(prompts))
    if num_folds < 2:
        return None, []
    fold = (np.random.default_rng(seed).permutation(len(prompts)) % num_folds)[cluster.reshape(-1)]
    scaled = np.empty_like(pairs.margin)
    temperatures: list[float | None] = []
    for index in range(num_folds):
        inverse, note = fit_inverse_temperature(pairs.margin[fold != index], pairs.target[fold != index])
        # All right, or no information: no temperature can be told from these pairs, so rewards stay as they are.
        factor = 1.0 if note == SEPARABLE else inverse
        scaled[fold == index] = factor * pairs.margin[fold == index]
        temperatures.append(None if note else 1 / inverse)
    return scaled, temperatures
