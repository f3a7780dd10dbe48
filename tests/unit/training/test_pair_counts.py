"""Exact statistics: hand-checked numbers, and no dependence on order."""

from __future__ import annotations

import math
import random

import pytest

from rm_scale.training.losses import LossSettings
from rm_scale.training.pair_counts import PairCounts, ScoredGroup, evaluate_groups, wilson_interval


def test_counts_correct_wrong_and_tied_rewards() -> None:
    groups = [
        ScoredGroup([1.0, 0.0], [0, 1], subset="a"),
        ScoredGroup([0.0, 1.0], [0, 1], subset="a"),
        ScoredGroup([0.5, 0.5], [0, 1], subset="b"),
        ScoredGroup([2.0, 0.0], [0, 1], subset="b"),
    ]
    result = evaluate_groups(groups, LossSettings()).as_dict()
    assert (result["accuracy"], result["num_pairs"], result["num_ties"]) == (0.5, 4, 1)
    assert result["mean_margin"] == pytest.approx(0.5)
    assert result["subsets"]["b"]["accuracy"] == 0.5
    assert result["subsets"]["b"]["num_ties"] == 1


def test_ranked_group_counts_each_pair_and_skips_label_ties() -> None:
    counts = PairCounts()
    counts.add(ScoredGroup([3.0, 2.0, 1.0], [0, 1, 1]), LossSettings(), keep_ties=True)
    assert (counts.num_pairs, counts.num_correct, counts.num_terms) == (2, 2, 3)


def test_order_of_groups_does_not_matter() -> None:
    generator = random.Random(0)
    groups = [ScoredGroup([generator.gauss(0, 1), generator.gauss(0, 1)], [0, 1]) for _ in range(101)]
    forward = evaluate_groups(groups, LossSettings()).as_dict()
    backward = evaluate_groups(groups[::-1], LossSettings()).as_dict()
    assert forward["accuracy"] == backward["accuracy"]
    assert forward["score_mean"] == backward["score_mean"]
    assert forward["loss"] == pytest.approx(backward["loss"], rel=1e-12)


def test_length_baselines() -> None:
    groups = [
        ScoredGroup([0.0, 0.0], [0, 1], lengths=[9, 5]),
        ScoredGroup([0.0, 0.0], [0, 1], lengths=[5, 9]),
        ScoredGroup([0.0, 0.0], [0, 1], lengths=[7, 7]),
        ScoredGroup([0.0, 0.0], [0, 1], lengths=[8, 7]),
    ]
    baselines = evaluate_groups(groups, LossSettings()).as_dict()["baselines"]
    assert baselines == {"longer_wins": 0.5, "shorter_wins": 0.25, "equal_length": 1}


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, table I: 81/263 gives 0.2553 - 0.3662, 0/20 gives 0.0000 - 0.1611.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_nothing_to_evaluate_has_no_accuracy() -> None:
    result = evaluate_groups([], LossSettings())
    assert result.as_dict()["accuracy"] is None
    assert math.isnan(result.score_mean)
