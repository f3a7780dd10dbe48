"""The whole evaluation of scored groups: slices, ties, soft labels, rankings, margins, several models."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from rm_scale.errors import ModelError
from rm_scale.evaluation.evaluate import (
    Resampling,
    ScoredModel,
    evaluate_all,
    evaluate_model,
    gate_metrics,
    histogram_edges,
    margins,
    ties,
)
from rm_scale.evaluation.scored_pairs import pairs_of
from rm_scale.training.losses import LossSettings
from rm_scale.training.pair_counts import ScoredGroup, evaluate_groups

FAST = Resampling(num_resamples=100)


def some_groups(seed: int = 0, count: int = 60) -> list[ScoredGroup]:
    """Pairs, rankings with ties and soft labels, of two subsets and two sources."""
    chance = random.Random(seed)
    groups = []
    for number in range(count):
        kind = number % 3
        size = 4 if kind == 1 else 2
        groups.append(
            ScoredGroup(
                rewards=[chance.gauss(0, 1) for _ in range(size)],
                ranks=[0, 1, 1, 2] if kind == 1 else [0, 1],
                soft_label=0.7 if kind == 2 else None,
                subset="code" if number % 2 else "math",
                lengths=[chance.randint(3, 30) for _ in range(size)],
                id=str(number),
                source="b.jsonl" if number >= count // 2 else "a.jsonl",
                prompt=f"p{number // 2}",
                content=f"c{number}",
            )
        )
    return groups


def model(groups: list[ScoredGroup], name: str = "m") -> ScoredModel:
    return ScoredModel(name, f"runs/{name}", groups)


def test_the_record_is_trainings_own() -> None:
    groups = some_groups()
    expected = evaluate_groups(groups, LossSettings()).as_dict()
    document: dict[str, Any] = dict(evaluate_all([model(groups)], FAST))
    for key in ("accuracy", "accuracy_ci95", "num_pairs", "num_ties", "loss", "mean_margin", "score_std", "baselines"):
        assert document[key] == expected[key] == document["models"][0][key], key
    assert document["subsets"] == expected["subsets"]
    json.dumps(document, allow_nan=False)


def test_a_slice_is_the_evaluation_of_its_groups_alone() -> None:
    groups = some_groups()
    whole = evaluate_model(model(groups), FAST)
    for part, name in ((whole["subsets"], "code"), (whole["sources"], "a.jsonl")):
        alone: dict[str, Any] = dict(
            evaluate_model(model([group for group in groups if name in (group.subset, group.source)]), FAST)
        )
        found = dict(part[name])
        for key in ("accuracy", "num_pairs", "loss", "num_groups", "num_prompts", "accuracy_ci95_prompts", "margins"):
            assert found[key] == alone[key], key
        assert found["calibration"] == alone["calibration"]
        assert found["ties"] == alone["ties"]
        # Per standard deviation of all scores, so this one number differs.
        differing = {"slope_std_per_100_tokens": None}
        assert {**part[name]["length_bias"], **differing} == {**alone["length_bias"], **differing}
    assert whole["num_groups"] == 60 and whole["num_prompts"] == 30
    assert sum(part["num_pairs"] for part in whole["sources"].values()) == whole["num_pairs"]


def test_rankings_give_all_their_pairs() -> None:
    group = ScoredGroup([3.0, 1.0, 2.0, 0.0], [0, 1, 1, 2], lengths=[4, 3, 2, 1])
    pairs = pairs_of([group])
    assert sorted(pairs.margin.tolist()) == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert sorted(pairs.length.tolist()) == [1, 1, 2, 2, 3]
    assert pairs.tie_margin.tolist() == [1.0]


def test_ties_by_hand() -> None:
    groups = [
        ScoredGroup([1.0, 1.0], [0, 1]),
        ScoredGroup([2.0, 0.0], [0, 1]),
        ScoredGroup([0.0, 1.0], [0, 1]),
        ScoredGroup([0.5, 0.0], [0, 1], soft_label=0.5),
        ScoredGroup([0.0, 1.0, 5.0], [1, 1, 0]),
    ]
    result = ties(pairs_of(groups))
    assert (result["num_reward_ties"], result["num_label_ties"]) == (1, 2)
    assert result["reward_tie_share"] == pytest.approx(1 / 5)
    assert result["label_tie_mean_abs_margin"] == pytest.approx(0.75)
    assert result["pair_mean_abs_margin"] == pytest.approx((0 + 2 + 1 + 5 + 4) / 5)
    # Ties 0.5 and 1 against distances 0, 2, 1, 5, 4: 4 of 5 are above 0.5; 3.5 of 5 above 1.
    assert result["label_tie_auc"] == pytest.approx((4 + 3.5) / 10)
    assert ties(pairs_of(groups[:1]))["label_tie_auc"] is None
    whole = evaluate_model(model(groups), FAST)
    assert (whole["num_pairs"], whole["num_ties"], whole["accuracy"]) == (5, 1, pytest.approx(3 / 5))


def test_margins_by_hand() -> None:
    values = np.asarray([-1.0, 0.0, 1.0, 2.0, 3.0])
    result = margins(values)
    assert (result["mean"], result["min"], result["max"]) == (1.0, -1.0, 3.0)
    assert result["std"] == pytest.approx(math.sqrt(2))
    assert result["quantiles"]["p50"] == 1.0
    assert sum(result["counts"]) == 5
    assert len(result["edges"]) == len(result["counts"]) + 1
    empty = margins(np.empty(0))
    assert (empty["edges"], empty["mean"], empty["quantiles"]["p50"]) == ([], None, None)


@pytest.mark.parametrize("seed", range(12))
def test_histogram_holds_every_margin_with_zero_as_an_edge(seed: int) -> None:
    random_numbers = np.random.default_rng(seed)
    values = random_numbers.standard_t(1.5, size=random_numbers.integers(1, 500)) * 10.0 ** random_numbers.integers(
        -6, 6
    )
    edges = histogram_edges(values)
    assert 0.0 in edges and len(edges) <= 64
    counts = margins(values)["counts"]
    assert sum(counts) == len(values)
    zero = int(np.flatnonzero(edges == 0)[0])
    assert sum(counts[:zero]) == int((values < 0).sum()), "wrong is left of zero"
    assert np.allclose(np.diff(edges), edges[1] - edges[0])


def test_all_margins_zero() -> None:
    assert margins(np.zeros(3))["counts"] == [0, 3]


def test_nothing_depends_on_the_order_of_groups() -> None:
    groups = some_groups()
    forward: Any = evaluate_model(model(groups), FAST)
    backward: Any = evaluate_model(model(groups[::-1]), FAST)
    for key in ("accuracy", "accuracy_ci95_prompts", "mean_margin", "loss", "score_mean"):
        assert forward[key] == pytest.approx(backward[key], rel=1e-12), key
    assert forward["calibration"]["ece"] == pytest.approx(backward["calibration"]["ece"], rel=1e-12)
    assert forward["length_bias"]["slope_per_token"] == pytest.approx(backward["length_bias"]["slope_per_token"])


def test_rewards_that_are_no_numbers_are_refused() -> None:
    groups = [*some_groups(count=4), ScoredGroup([math.nan, 1.0], [0, 1], id="bad")]
    with pytest.raises(ModelError, match=r"runs/m: 1 of 5 groups have rewards that are not finite .* first is bad"):
        evaluate_model(model(groups), FAST)


def test_no_groups_give_a_document_without_nan() -> None:
    document = evaluate_all([model([])], FAST)
    assert document["models"][0]["accuracy"] is None
    json.dumps(document, allow_nan=False)


def test_several_models() -> None:
    first, second, third = some_groups(0), some_groups(0), some_groups(0)
    second = [ScoredGroup(**{**vars(group), "rewards": [-r for r in group.rewards]}) for group in second]
    document = evaluate_all([model(first, "a"), model(second, "b"), model(third, "c")], FAST)
    assert [(one["first"], one["second"]) for one in document["agreement"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [(one["first"], one["second"]) for one in document["comparisons"]] == [("a", "b"), ("a", "c")]
    assert document["agreement"][0]["spearman_scores"] == pytest.approx(-1)
    assert document["agreement"][1]["agreement"] == 1.0
    assert document["comparisons"][1]["p_value"] == 1.0
    metrics = gate_metrics(document)
    assert metrics["comparison.accuracy_difference"] == document["comparisons"][0]["accuracy_difference"]
    assert metrics["comparison.c.accuracy_difference"] == 0.0
    assert metrics["accuracy"] == document["models"][0]["accuracy"]


def test_benchmarks_alone() -> None:
    document = evaluate_all([], FAST, {"m": {"rb": {"score": 0.5, "parts": {"Chat": 0.25}}}})
    assert document["models"] == [] and "accuracy" not in document
    assert gate_metrics(document)["benchmarks.rb.parts.Chat"] == 0.25
