"""Calibration: errors worked out by hand, temperatures that are known, and no optimism in the corrected error."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rm_scale.evaluation.calibration import (
    NO_INFORMATION,
    NO_PAIRS,
    SEPARABLE,
    calibration,
    expected_calibration_error,
    fit_inverse_temperature,
    negative_log_likelihood,
    reliability_bins,
)
from rm_scale.evaluation.scored_pairs import Pairs, pairs_of
from rm_scale.training.pair_counts import ScoredGroup, wilson_interval


def pairs(margins: list[float], soft: list[float | None] | None = None, prompts: list[str] | None = None) -> Pairs:
    """Pairs with these margins; soft labels and prompts as given."""
    soft = soft or [None] * len(margins)
    prompts = prompts or [""] * len(margins)
    return pairs_of(
        [
            ScoredGroup([margin, 0.0], [0, 1], soft_label=label, prompt=prompt)
            for margin, label, prompt in zip(margins, soft, prompts, strict=True)
        ]
    )


def margin_of(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_bins_and_error_by_hand() -> None:
    # Predicted 0.72 four times, right three times; 0.93 twice, right once; a tie of rewards is half right at 0.5.
    certain, surer = margin_of(0.72), margin_of(0.93)
    result = calibration(pairs([certain, certain, certain, -certain, surer, -surer, 0.0]))
    bins = {round(part["low"], 2): part for part in result["bins"]}
    assert [part["count"] for part in result["bins"]] == [1, 0, 0, 0, 4, 0, 0, 0, 2, 0]
    assert (bins[0.5]["predicted"], bins[0.5]["observed"]) == (0.5, 0.5)
    assert bins[0.7]["predicted"] == pytest.approx(0.72)
    assert bins[0.7]["observed"] == 0.75
    assert bins[0.7]["observed_ci95"] == pytest.approx(list(wilson_interval(3, 4)))
    assert bins[0.9]["observed"] == 0.5
    assert bins[0.55]["predicted"] is None and bins[0.55]["observed_ci95"] is None
    assert result["ece"] == pytest.approx((4 * 0.03 + 2 * 0.43 + 0) / 7)


def test_perfectly_calibrated_set_has_no_error() -> None:
    margins = [margin_of(0.75)] * 3 + [-margin_of(0.75)] + [margin_of(0.9)] * 9 + [-margin_of(0.9)]
    result = calibration(pairs(margins))
    assert result["ece"] == pytest.approx(0, abs=1e-12)
    assert result["temperature"] == pytest.approx(1.0, rel=1e-9)


def test_ends_of_the_scale_fall_into_the_outer_bins() -> None:
    bins = reliability_bins(np.asarray([0.5, 1.0, 0.95]), np.asarray([0.0, 1.0, 1.0]))
    assert (bins[0]["count"], bins[-1]["count"]) == (1, 2)
    assert expected_calibration_error(bins) == pytest.approx((0.5 + 2 * 0.025) / 3)


def test_soft_labels_count_with_their_probability() -> None:
    # Response 0 is better with 0.8. The model prefers it at 0.7: observed 0.8. The other way round: observed 0.2.
    right, wrong = pairs([margin_of(0.7)], [0.8]), pairs([-margin_of(0.7)], [0.8])
    assert calibration(right)["ece"] == pytest.approx(0.1)
    assert calibration(wrong)["ece"] == pytest.approx(0.5)
    # Label 0.2 says the second response is the better one, so its margin is turned round.
    assert pairs([1.5], [0.2]).margin.tolist() == [-1.5]
    assert pairs([1.5], [0.2]).target.tolist() == pytest.approx([0.8])
    assert calibration(pairs([1.0], [0.5]))["ece"] is None, "a label of 0.5 is a tie, not a pair"


def test_likelihood_by_hand() -> None:
    given = pairs([2.0, -1.0], [0.9, None])
    expected = (0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2)) + math.log1p(math.exp(1))) / 2
    assert calibration(given)["nll"] == pytest.approx(expected)
    assert negative_log_likelihood(np.asarray([5000.0, -5000.0]), np.ones(2)) == pytest.approx(2500), "no overflow"


@pytest.mark.parametrize("known", [0.5, 1.0, 4.0])
def test_a_known_temperature_is_found(known: float) -> None:
    """Labels drawn with margins / T: the fit gives T back, and the error of the corrected rewards is chance alone."""
    chance = random.Random(7)
    margins = [chance.gauss(0, 2 * known) for _ in range(20_000)]
    drawn = [m if chance.random() < 1 / (1 + math.exp(-m / known)) else -m for m in margins]
    result = calibration(pairs(drawn))
    assert result["temperature"] == pytest.approx(known, rel=0.05)
    assert result["num_folds"] == len(result["fold_temperatures"]) == 5
    assert result["ece_after"] is not None and result["ece_after"] < 0.012
    if known == 4.0:
        assert result["ece"] is not None and result["ece"] > 0.1
        assert result["nll_after"] is not None and result["nll"] is not None and result["nll_after"] < result["nll"]


def test_the_fit_is_the_best_of_a_grid() -> None:
    chance = random.Random(1)
    given = pairs([chance.gauss(0.7, 1.5) for _ in range(200)], [chance.uniform(0.1, 0.9) for _ in range(200)])
    inverse, note = fit_inverse_temperature(given.margin, given.target)
    assert note == ""
    best = negative_log_likelihood(inverse * given.margin, given.target)
    assert best is not None
    for factor in np.geomspace(inverse / 10, inverse * 10, 201):
        other = negative_log_likelihood(factor * given.margin, given.target)
        assert other is not None and best <= other + 1e-12


def test_where_there_is_no_temperature_it_says_why() -> None:
    for margins, note in ([1.0, 2.0], SEPARABLE), ([-1.0, -2.0, 0.5], NO_INFORMATION), ([], NO_PAIRS):
        result = calibration(pairs(margins))
        assert (result["temperature"], result["temperature_note"]) == (None, note)
    assert calibration(pairs([0.0, 0.0]))["temperature_note"] == NO_INFORMATION
    nothing = calibration(pairs([]))
    assert (nothing["ece"], nothing["nll"], nothing["ece_after"], nothing["ece_if_calibrated"]) == (None,) * 4


def test_corrected_error_is_not_optimistic() -> None:
    """Temperatures come from other prompts: all pairs of a prompt are in one fold, and each fold's T from the rest."""
    chance = random.Random(3)
    margins = [chance.gauss(0.5, 1.0) for _ in range(60)]
    given = pairs(margins, prompts=[f"p{number // 6}" for number in range(60)])
    result = calibration(given, seed=5)
    fold = (np.random.default_rng(5).permutation(10) % 5)[np.arange(60) // 6]
    scaled = np.empty(60)
    for index in range(5):
        inverse, _ = fit_inverse_temperature(given.margin[fold != index], given.target[fold != index])
        assert result["fold_temperatures"][index] == pytest.approx(1 / inverse)
        scaled[fold == index] = inverse * given.margin[fold == index]
    assert result["nll_after"] == pytest.approx(np.mean(np.log1p(np.exp(-scaled))))
    # In sample it would look better than it is.
    assert result["temperature"] is not None
    in_sample = negative_log_likelihood(given.margin / result["temperature"], given.target)
    assert in_sample is not None and result["nll_after"] is not None and in_sample < result["nll_after"]
    assert calibration(pairs(margins[:4], prompts=["p"] * 4))["ece_after"] is None, "one prompt can't be held out"


def test_chance_alone_is_what_calibrated_models_show() -> None:
    """The mean error of calibrated models over many draws is what is announced."""
    chance = random.Random(11)
    errors, announced = [], []
    for _ in range(200):
        margins = [abs(chance.gauss(0, 2)) for _ in range(300)]
        drawn = [m if chance.random() < 1 / (1 + math.exp(-m)) else -m for m in margins]
        bins = reliability_bins(1 / (1 + np.exp(-np.abs(drawn))), (np.asarray(drawn) > 0).astype(float))
        error = expected_calibration_error(bins)
        expected = calibration(pairs(drawn))["ece_if_calibrated"]
        assert error is not None and expected is not None
        errors.append(error)
        announced.append(expected)
    assert np.mean(announced) == pytest.approx(np.mean(errors), rel=0.08)
