"""Agreement and comparison of two models: by hand, against brute force, and coverage where the truth is known."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest

from rm_scale.errors import DataError
from rm_scale.evaluation.model_comparison import agreement, cohens_kappa, compare, match, mcnemar_exact
from rm_scale.evaluation.resampling import (
    accuracy_interval,
    correlation,
    ranks_of,
    resampled_means,
    spearman,
    two_sided_p_value,
)
from rm_scale.training.pair_counts import ScoredGroup, wilson_interval

NAMES = ("new", "old")


def groups(margins: list[float], prompts: list[str] | None = None) -> list[ScoredGroup]:
    prompts = prompts or [f"p{number}" for number in range(len(margins))]
    return [
        ScoredGroup([margin, 0.0], [0, 1], id=str(number), prompt=prompt, content=f"c{number}")
        for number, (margin, prompt) in enumerate(zip(margins, prompts, strict=True))
    ]


# --- McNemar -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(product(range(0, 9), range(0, 9))))
def test_mcnemar_is_the_binomial_sum(first: int, second: int) -> None:
    total = first + second
    tail = sum(math.comb(total, k) for k in range(min(first, second) + 1)) / 2**total
    assert mcnemar_exact(first, second) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_mcnemar_of_many_pairs() -> None:
    exact = 2 * sum(math.comb(5000, k) for k in range(2401)) / 2**5000
    assert mcnemar_exact(2600, 2400) == pytest.approx(exact, rel=1e-9)
    assert 0 <= mcnemar_exact(2_000_000, 1_000_000) < 1e-300
    assert mcnemar_exact(1_000_000, 1_000_000) == 1.0


# --- Bootstrap -----------------------------------------------------------------------------------------------------


def test_resampled_means_are_those_of_drawn_prompts() -> None:
    """Drawing kinds of prompts gives the distribution of drawing prompts one by one."""
    random_numbers = np.random.default_rng(0)
    cluster = np.asarray([0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 5])
    values = random_numbers.integers(0, 2, size=(12, 1)).astype(float)
    fast = resampled_means(values, cluster, 20_000, seed=1)[:, 0]
    slow = []
    for _ in range(20_000):
        drawn = random_numbers.integers(0, 6, size=6)
        rows = np.concatenate([np.flatnonzero(cluster == number) for number in drawn])
        slow.append(float(values[rows].mean()))
    assert fast.mean() == pytest.approx(np.mean(slow), abs=0.005)
    assert np.quantile(fast, [0.025, 0.25, 0.75, 0.975]) == pytest.approx(
        np.quantile(slow, [0.025, 0.25, 0.75, 0.975]), abs=0.03
    )
    assert (fast == resampled_means(values, cluster, 20_000, seed=1)[:, 0]).all(), "a seed fixes all draws"


def test_interval_covers_the_true_difference() -> None:
    """Two models that are right with 0.75 and 0.65, several pairs per prompt: 95 % intervals hold 0.1 in about 95 %."""
    random_numbers = np.random.default_rng(5)
    covered, trials = 0, 200
    for trial in range(trials):
        ease = random_numbers.normal(scale=0.15, size=60)
        ours, theirs = [], []
        for number in range(60):
            for _ in range(3):
                ours.append(1.0 if random_numbers.random() < 0.75 + ease[number] else -1.0)
                theirs.append(1.0 if random_numbers.random() < 0.65 + ease[number] else -1.0)
        prompts = [f"p{number // 3}" for number in range(180)]
        result = compare(match(groups(ours, prompts), groups(theirs, prompts), NAMES), *NAMES, 500, seed=trial)
        assert result["accuracy_difference_ci95"] is not None
        low, high = result["accuracy_difference_ci95"]
        # Chances beyond 1 are cut, so the true difference is a little below 0.1.
        cut = (np.minimum(0.75 + ease, 1) - np.minimum(0.65 + ease, 1)).mean()
        covered += low <= cut <= high
    assert 0.90 <= covered / trials <= 0.99


def test_clusters_widen_the_interval() -> None:
    credit = np.repeat(np.asarray([1.0, 0.0] * 20), 10)
    by_prompt = accuracy_interval(credit, np.repeat(np.arange(40), 10))
    # All ten pairs of a prompt say the same: they are worth one, but for the correction C / (C - 1).
    assert by_prompt == pytest.approx(list(wilson_interval(19.5, 39)))
    assert accuracy_interval(credit, np.arange(400)) == pytest.approx(list(wilson_interval(200, 400)), rel=1e-2)


@pytest.mark.parametrize(("accuracy", "spread"), [(0.7, 0.2), (0.97, 0.03)])
def test_interval_covers_the_true_accuracy(accuracy: float, spread: float) -> None:
    """Prompts differ in difficulty and have five pairs each; near 1 as well as in the middle."""
    random_numbers = np.random.default_rng(8)
    cluster = np.repeat(np.arange(60), 5)
    covered = 0
    for _ in range(500):
        ease = random_numbers.choice([accuracy - spread, accuracy + spread], size=60)[cluster]
        interval = accuracy_interval((random_numbers.random(300) < ease).astype(float), cluster)
        assert interval is not None
        covered += interval[0] <= accuracy <= interval[1]
    assert 0.93 <= covered / 500 <= 0.985


def test_interval_where_nothing_varies() -> None:
    assert accuracy_interval(np.ones(6), np.asarray([0, 0, 1, 1, 2, 2])) == list(wilson_interval(3, 3))
    assert accuracy_interval(np.zeros(2), np.asarray([0, 1])) == list(wilson_interval(0, 2))
    assert accuracy_interval(np.ones(6), np.zeros(6, dtype=np.int64)) is None
    assert accuracy_interval(np.empty(0), np.empty(0, dtype=np.int64)) is None


def test_p_value_of_resamples() -> None:
    assert two_sided_p_value(np.asarray([1.0] * 99)) == pytest.approx(2 / 100)
    assert two_sided_p_value(np.asarray([0.0] * 50)) == 1.0
    assert two_sided_p_value(np.asarray([1.0] * 90 + [-1.0] * 9)) == pytest.approx(2 * 10 / 100)


def test_p_values_are_honest_when_models_are_alike() -> None:
    random_numbers = np.random.default_rng(9)
    rejected = 0
    for trial in range(200):
        ours, theirs = random_numbers.normal(0.5, 1, 120).tolist(), random_numbers.normal(0.5, 1, 120).tolist()
        result = compare(match(groups(ours), groups(theirs), NAMES), *NAMES, 300, seed=trial)
        rejected += result["verdict"] != "undecided"
    assert rejected / 200 <= 0.10


def test_a_clear_difference_is_seen() -> None:
    ours, theirs = [1.0] * 90 + [-1.0] * 10, [1.0] * 60 + [-1.0] * 40
    result = compare(match(groups(ours), groups(theirs), NAMES), *NAMES)
    assert (result["accuracy_first"], result["accuracy_second"]) == (0.9, 0.6)
    assert result["accuracy_difference"] == pytest.approx(0.3)
    assert (result["verdict"], result["num_prompts"], result["num_resamples"]) == ("first", 100, 2000)
    assert result["mcnemar_p_value"] == pytest.approx(2 / 2**30)
    back = compare(match(groups(theirs), groups(ours), NAMES), *NAMES)
    assert back["verdict"] == "second"
    assert back["accuracy_difference_ci95"] is not None and result["accuracy_difference_ci95"] is not None
    assert back["accuracy_difference_ci95"] == pytest.approx([-x for x in result["accuracy_difference_ci95"][::-1]])


def test_a_tie_of_rewards_is_not_right() -> None:
    result = compare(match(groups([0.0, 1.0]), groups([1.0, 1.0]), NAMES), *NAMES)
    assert (result["accuracy_first"], result["accuracy_second"]) == (0.5, 1.0)


# --- Agreement -----------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    ours, theirs = [1.0, 2.0, -1.0, 0.5, -2.0, 0.0], [2.0, 1.0, 1.0, -1.0, -1.0, 0.0]
    result = agreement(match(groups(ours), groups(theirs), NAMES), *NAMES)
    assert result["agreement"] == pytest.approx(4 / 6)
    counts = (result["both_correct"], result["first_only"], result["second_only"], result["neither"])
    assert counts == (2, 1, 1, 2)
    # Both: right in 3 of 6, wrong in 2, tied in 1: chance is (9 + 4 + 1) / 36.
    assert result["kappa"] == pytest.approx((4 / 6 - 14 / 36) / (1 - 14 / 36))
    assert result["spearman_margins"] == pytest.approx(
        correlation(ranks_of(np.asarray(ours)), ranks_of(np.asarray(theirs)))
    )


def test_kappa_has_no_value_where_chance_always_agrees() -> None:
    assert cohens_kappa(np.ones(4), np.ones(4)) is None
    assert cohens_kappa(np.empty(0), np.empty(0)) is None
    assert cohens_kappa(np.asarray([1.0, -1.0]), np.asarray([-1.0, 1.0])) == -1.0


def test_rank_correlation_by_hand() -> None:
    assert ranks_of(np.asarray([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    # 1 - 6 sum(d^2) / (n (n^2 - 1)), without ties.
    first, second = np.asarray([1.0, 2.0, 3.0, 4.0, 5.0]), np.asarray([2.0, 1.0, 4.0, 3.0, 50.0])
    assert spearman(first, second) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman(first, np.ones(5)) is None


# --- Matching ------------------------------------------------------------------------------------------------------


def test_groups_are_matched_by_what_they_say() -> None:
    ours = groups([1.0, -1.0, 1.0, 1.0])
    theirs = [ours[2], ours[0], ScoredGroup([1.0, 0.0], [0, 1], content="another")]
    matched = match(ours, theirs, NAMES)
    assert (len(matched.first), matched.num_left_out) == (2, 3)
    assert matched.first.margin.tolist() == matched.second.margin.tolist() == [1.0, 1.0]


def test_equal_groups_are_matched_in_their_order() -> None:
    twice = [ScoredGroup([m, 0.0], [0, 1], content="same") for m in (1.0, 2.0, 3.0)]
    matched = match(twice, twice[:2], NAMES)
    assert matched.first.margin.tolist() == matched.second.margin.tolist() == [1.0, 2.0]
    assert matched.num_left_out == 1


def test_without_texts_groups_are_matched_by_id_and_their_labels_must_agree() -> None:
    ours = [ScoredGroup([1.0, 0.0], [0, 1], id="a"), ScoredGroup([1.0, 0.0], [0, 1], id="b")]
    assert len(match(ours, ours[::-1], NAMES).first) == 2
    turned = [ScoredGroup([1.0, 0.0], [1, 0], id="a")]
    with pytest.raises(DataError, match=r"group a has labels \[0, 1\] in one and \[1, 0\] in the other"):
        match(ours, turned, NAMES)
    with pytest.raises(DataError, match=r"new and old: no group of one is among those of the other \(by id\)"):
        match(ours, [ScoredGroup([1.0, 0.0], [0, 1], id="z")], NAMES)


def test_chance_of_margins_is_independent_of_group_order() -> None:
    chance = random.Random(0)
    ours = groups([chance.gauss(0.4, 1) for _ in range(50)])
    theirs = groups([chance.gauss(0.4, 1) for _ in range(50)])
    order = list(range(50))
    chance.shuffle(order)
    first = compare(match(ours, theirs, NAMES), *NAMES)
    again = compare(match([ours[i] for i in order], theirs, NAMES), *NAMES)
    assert first == again
