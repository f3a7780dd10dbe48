"""Best-of-n estimates against enumeration of all subsets, and its KL against what sampling gives."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from rm_scale.inference.ranking.best_of_n import (
    CurveSamples,
    curve_table,
    expected_best,
    kl_bound,
    mean_interval,
    weight_rows,
)


def brute_force(scores: list[float], n: int, values: list[float]) -> float:
    """Mean over all subsets of n, and over which of the best-scored ones is taken."""
    worth = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[place] for place in subset)
        best = [values[place] for place in subset if scores[place] == top]
        worth.append(sum(best) / len(best))
    return sum(worth) / len(worth)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [None, 3])
def test_expected_best_is_the_mean_over_all_subsets(seed: int, levels: int | None) -> None:
    source = random.Random(seed)
    size = 3 + 2 * seed
    scores = [source.gauss(0, 1) if levels is None else float(source.randrange(levels)) for _ in range(size)]
    values = [source.gauss(0, 1) for _ in range(size)]
    of_scores, of_values = expected_best(scores, size), expected_best(scores, size, values)
    for n in range(1, size + 1):
        assert of_scores[n - 1] == pytest.approx(brute_force(scores, n, scores), abs=1e-12)
        if levels is None:
            assert of_values[n - 1] == pytest.approx(brute_force(scores, n, values), abs=1e-12)


def test_values_of_tied_scores_are_taken_as_often_as_each_other() -> None:
    """Ties are broken by a random order of the samples: brute force over all orders, first of the best wins."""
    scores, values = [1.0, 2.0, 2.0, 0.0, 2.0], [5.0, 1.0, 4.0, 9.0, 7.0]
    for n in range(1, 6):
        taken = []
        for order in itertools.permutations(range(5)):
            subset = order[:n]
            best = max(subset, key=lambda place: scores[place])
            taken.append(values[best])
        assert expected_best(scores, 5, values)[n - 1] == pytest.approx(sum(taken) / len(taken), abs=1e-12)


def test_order_of_samples_changes_nothing() -> None:
    scores, values = [0.3, 0.1, 0.3, -2.0, 0.9, 0.1], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    expected = expected_best(scores, 6, values)
    for order in itertools.permutations(range(6)):
        shuffled = expected_best([scores[i] for i in order], 6, [values[i] for i in order])
        assert shuffled == pytest.approx(expected, abs=1e-12)


def test_estimate_is_unbiased_where_the_truth_is_known() -> None:
    """The best of n uniform samples is n / (n + 1) on average."""
    generator = np.random.default_rng(0)
    curves = np.stack([expected_best(row, 8) for row in generator.random((20_000, 8))])
    truth = np.array([n / (n + 1) for n in range(1, 9)])
    error = curves.std(axis=0) / math.sqrt(len(curves))
    assert (np.abs(curves.mean(axis=0) - truth) < 4 * error).all()


@pytest.mark.parametrize(("num_samples", "max_n"), [(7, 7), (64, 64), (300, 300), (1500, 40)])
def test_weights_are_the_quotients_of_whole_numbers(num_samples: int, max_n: int) -> None:
    for n, row in enumerate(weight_rows(num_samples, max_n), start=1):
        subsets = math.comb(num_samples, n)
        exact = [math.comb(i - 1, n - 1) / subsets for i in range(1, num_samples + 1)]
        assert row == pytest.approx(np.array(exact), rel=1e-11, abs=1e-300)


def test_thousands_of_samples_have_a_curve_of_a_thousand_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these took minutes, or more memory than there is."""
    samples = CurveSamples()
    samples.add(list(range(20_000)), None)
    points = samples.curves().points
    assert len(points) == 1000 and points[-1].reward == pytest.approx(20_001 * 1000 / 1001 - 1)
    scores = list(np.random.default_rng(0).random(50))
    by_matrix = expected_best(scores, 50)
    monkeypatch.setattr("rm_scale.inference.ranking.best_of_n._LARGEST_MATRIX", 0)
    assert expected_best(scores, 50) == pytest.approx(by_matrix, rel=1e-12)


def test_kl_formula_is_that_of_the_best_of_n_of_many_distinct_samples() -> None:
    """The place of the best of n in the base distribution has density n u^(n-1): KL is the mean of its logarithm."""
    generator = np.random.default_rng(1)
    assert kl_bound(1) == 0
    for n in (2, 4, 16, 64):
        quantile = generator.random((40_000, n)).max(axis=1)
        log_ratio = math.log(n) + (n - 1) * np.log(quantile)
        error = log_ratio.std() / math.sqrt(len(log_ratio))
        assert abs(log_ratio.mean() - kl_bound(n)) < 4 * error


def test_kl_formula_is_an_upper_bound_when_completions_are_few() -> None:
    """Beirami et al. 2024: with two completions of probability 1/2 the divergence stays below log 2."""
    for n in (2, 8, 64):
        worse = 0.5**n
        exact = worse * math.log(worse / 0.5) + (1 - worse) * math.log((1 - worse) / 0.5)
        assert exact < kl_bound(n)
        assert exact <= math.log(2)


def test_band_covers_the_truth_and_both_ways_agree() -> None:
    generator = np.random.default_rng(2)
    inside = 0
    for trial in range(100):
        curves = generator.normal(0, 1, (60, 1))
        low, high, how = mean_interval(curves, 400, seed=trial)
        inside += bool(low[0] <= 0 <= high[0])
    assert "bootstrap" in how
    assert 86 <= inside <= 100
    large = generator.normal(0, 1, (6000, 2))
    low, high, how = mean_interval(large)
    assert "normal" in how
    few_low, few_high, _ = mean_interval(large[:5000], 2000)
    assert high - low == pytest.approx((few_high - few_low) * math.sqrt(5 / 6), rel=0.1)


def test_every_n_speaks_of_the_same_prompts() -> None:
    samples = CurveSamples()
    for scores in ([1.0, 2.0, 3.0], [0.0, 4.0, 4.0], [9.0, 9.0]):
        samples.add(scores, None)
    samples.add([], None)
    result = samples.curves()
    assert result.max_n == 3
    assert result.num_prompts == 2
    assert result.num_completions == 6
    assert result.left_out == {"no_scored_completion": 1, "fewer_than_max_n": 1}
    assert [point.reward for point in result.points] == pytest.approx([(2 + 8 / 3) / 2, (8 / 3 + 4) / 2, 3.5])
    assert result.tied_share == pytest.approx(2 / 6)
    assert samples.curves(max_n=2).num_prompts == 3


def test_overoptimisation_shows_in_the_gold_curve() -> None:
    """A reward that goes with the gold score below its middle and against it above."""
    generator = np.random.default_rng(3)
    samples = CurveSamples()
    for _ in range(300):
        scores = generator.normal(0, 1, 16)
        samples.add(scores.tolist(), (-np.abs(scores - 0.8)).tolist())
    result = samples.curves(num_resamples=200)
    peak = result.gold_peak
    assert peak is not None and 2 <= peak.n <= 6
    assert peak.gold is not None and peak.gold_ci95 is not None
    last = result.points[-1]
    assert last.gold is not None and last.gold_ci95 is not None and last.gold_oracle is not None
    assert last.gold_ci95[1] < peak.gold_ci95[0]
    assert last.gold_oracle > last.gold
    assert f"the gold score is highest at n = {peak.n}" in curve_table(result)
    text = result.to_json()
    assert text["gold_peak_n"] == peak.n
    assert text["num_prompts"] == 300


def test_prompts_without_gold_are_left_out_by_name_and_nothing_gives_no_curve() -> None:
    samples = CurveSamples()
    samples.add([1.0, 2.0], [None, 3.0])
    result = samples.curves()
    assert result.points == []
    assert result.left_out == {"no_gold_score": 1}
    assert "no prompt could be used" in curve_table(result)
    samples.add([1.0, 2.0], [5.0, 3.0])
    alone = samples.curves()
    assert alone.points[1].reward_ci95 is None
    assert alone.points[1].gold == 3.0
