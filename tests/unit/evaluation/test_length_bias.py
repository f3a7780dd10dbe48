"""Length bias: accuracies by hand, the slope against its closed form, its interval against a known truth."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rm_scale.evaluation.length_bias import fit_line, length_bias, length_bins
from rm_scale.evaluation.scored_pairs import pairs_of
from rm_scale.training.pair_counts import ScoredGroup, wilson_interval


def group(margin: float, better: int, worse: int, prompt: str = "") -> ScoredGroup:
    return ScoredGroup([margin, 0.0], [0, 1], lengths=[better, worse], prompt=prompt)


def test_accuracies_by_hand() -> None:
    groups = [group(1, 9, 5), group(1, 8, 5), group(-1, 7, 5), group(1, 3, 5), group(-2, 2, 5), group(0, 5, 5)]
    result = length_bias(pairs_of(groups), score_std=2.0)
    longer, shorter, equal = result["better_longer"], result["better_shorter"], result["better_equal"]
    assert (longer["num_pairs"], longer["accuracy"]) == (3, pytest.approx(2 / 3))
    assert longer["accuracy_ci95"] == pytest.approx(list(wilson_interval(2, 3)))
    assert longer["mean_margin"] == pytest.approx(1 / 3)
    assert (shorter["num_pairs"], shorter["accuracy"]) == (2, 0.5)
    assert (equal["num_pairs"], equal["accuracy"]) == (1, 0.0)
    assert result["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert (result["longer_wins"], result["shorter_wins"]) == (0.5, pytest.approx(1 / 3))


def test_slope_against_the_closed_form() -> None:
    chance = random.Random(2)
    x = [chance.randint(-40, 40) for _ in range(50)]
    y = [0.3 + 0.02 * a + chance.gauss(0, 1) for a in x]
    groups = [group(b, 100 + a, 100) for a, b in zip(x, y, strict=True)]
    result = length_bias(pairs_of(groups), score_std=0.5)
    n, sx, sy = 50, sum(x), sum(y)
    sxy, sxx, syy = (sum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((x, y), (x, x), (y, y)))
    slope = (n * sxy - sx * sy) / (n * sxx - sx * sx)
    assert result["slope_per_token"] == pytest.approx(slope)
    assert result["intercept"] == pytest.approx((sy - slope * sx) / n)
    assert result["slope_std_per_100_tokens"] == pytest.approx(200 * slope)
    r = (n * sxy - sx * sy) / math.sqrt((n * sxx - sx * sx) * (n * syy - sy * sy))
    assert result["correlation"] == pytest.approx(r)


def test_interval_of_the_slope_by_matrices() -> None:
    """The sandwich written out with the whole design matrix, with clusters of several pairs."""
    random_numbers = np.random.default_rng(0)
    x, cluster = random_numbers.normal(size=30), np.arange(30) // 3
    y = 1 + 2 * x + random_numbers.normal(size=30)
    line = fit_line(x, y, cluster)
    design = np.column_stack([np.ones(30), x])
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    residuals = y - design @ coefficients
    meat = np.zeros((2, 2))
    for number in range(10):
        score = design[cluster == number].T @ residuals[cluster == number]
        meat += np.outer(score, score)
    variance = (inverse @ meat @ inverse)[1, 1] * 10 / 9 * 29 / 28
    half = 1.959963984540054 * math.sqrt(variance)
    assert line is not None and line.slope_ci95 is not None
    assert (line.intercept, line.slope) == pytest.approx(tuple(coefficients))
    assert line.slope_ci95 == pytest.approx([coefficients[1] - half, coefficients[1] + half])


def test_interval_covers_the_true_slope_although_prompts_have_several_pairs() -> None:
    """Pairs of a prompt share most of their error and their length: the interval must not take them as independent."""
    random_numbers = np.random.default_rng(4)
    cluster = np.repeat(np.arange(80), 6)
    covered = 0
    for _ in range(300):
        x = random_numbers.normal(size=80)[cluster] + 0.3 * random_numbers.normal(size=480)
        y = 0.5 * x + random_numbers.normal(size=80)[cluster] + 0.3 * random_numbers.normal(size=480)
        line = fit_line(x, y, cluster)
        assert line is not None and line.slope_ci95 is not None
        covered += line.slope_ci95[0] <= 0.5 <= line.slope_ci95[1]
    assert 0.90 <= covered / 300 <= 0.98


def test_bins_hold_about_as_many_pairs_and_all_of_them() -> None:
    length = np.asarray([-9, -5, -5, -5, 0, 0, 0, 0, 3, 12], dtype=np.int64)
    bins = length_bins(np.arange(10, dtype=np.float64) - 4.5, length, num_bins=4)
    assert [(part["low"], part["high"], part["num_pairs"]) for part in bins] == [(-9, -5, 4), (0, 0, 4), (3, 12, 2)]
    assert [part["accuracy"] for part in bins] == [0.0, 0.75, 1.0]
    assert length_bins(np.empty(0), np.empty(0, dtype=np.int64)) == []


def test_what_does_not_exist_is_none() -> None:
    unknown = length_bias(pairs_of([ScoredGroup([1.0, 0.0], [0, 1])]), 1.0)
    assert (unknown["num_pairs"], unknown["longer_wins"], unknown["bins"]) == (0, None, [])
    assert unknown["better_longer"]["accuracy"] is None
    same = length_bias(pairs_of([group(1, 5, 4), group(2, 6, 5)]), 1.0)
    assert (same["slope_per_token"], same["correlation"], same["balanced_accuracy"]) == (None, None, None)
    few = length_bias(pairs_of([group(1, 5, 4), group(2, 7, 5)]), None)
    assert few["slope_per_token"] == pytest.approx(1.0)
    assert (few["slope_ci95"], few["slope_std_per_100_tokens"]) == (None, None)
