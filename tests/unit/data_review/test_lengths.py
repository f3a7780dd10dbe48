"""Lengths: what `max_length` cuts, and how many tokens each layout takes, against small examples counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rm_scale.config import RunConfig
from rm_scale.data_review.lengths import GroupLengths, cut_at, filled, histogram_of, layouts, review_lengths
from rm_scale.data_review.sample import SampledGroup


def group(prompt: int, *responses: int) -> SampledGroup:
    lengths = tuple(prompt + response for response in responses)
    return SampledGroup("file", 0, "p", tuple("r" for _ in responses), (), prompt, lengths)


def test_what_max_length_cuts() -> None:
    lengths = GroupLengths.of([group(10, 10, 20), group(50, 10, 20), group(5, 60, 70), group(1, 2, 3)])
    cut = cut_at(lengths, 40)
    # The second is 70 long and has a prompt to cut; the third is 75 long, and its prompt is too short for that.
    assert (cut.over, cut.truncated, cut.lost_even_so) == (0.5, 0.25, 0.25)
    total = (20 + 30) + (60 + 70) + (65 + 75) + (3 + 4)
    assert cut.tokens_cut == pytest.approx((2 * 30 + 140) / total)


def test_layouts_count_processed_tokens() -> None:
    groups = [group(100, 10, 20), group(100, 20, 10)]
    found = layouts(GroupLengths.of(groups), groups, seed=0)
    assert found["padded"]["1"] == pytest.approx(4 * 120 / 460)
    assert found["prefix_shared"] == pytest.approx(260 / 460)


def test_rows_under_a_budget_are_filled() -> None:
    found = filled(np.array([60, 40, 60, 40, 500]), 100, np.arange(5))
    assert found == {"max_tokens_per_device": 100, "filled": 1.0, "groups_too_large": pytest.approx(0.2)}


def test_histogram_counts_every_value() -> None:
    values = np.array([0, 1, 2, 3, 1000] + [5] * 995)
    found = histogram_of(values)
    assert sum(found["counts"]) + found["above"] == len(values) and found["max"] == 1000
    assert len(found["edges"]) == len(found["counts"]) + 1


def config(**values: object) -> RunConfig:
    return RunConfig(model_name_or_path="none", **values)  # type: ignore[arg-type]


def test_a_limit_that_loses_groups_gets_one_that_holds_them() -> None:
    groups = [group(10, 20, 30)] * 95 + [group(600, 300, 10)] * 5
    figures, (finding,) = review_lengths(groups, config(max_length=512), seed=0)
    assert (finding.count, finding.out_of, finding.level) == (5, 100, "problem")
    assert finding.suggestion is not None and finding.suggestion.settings == "--max_length 960"
    assert "would lose 0.0% instead of 5.0%" in finding.suggestion.text
    assert next(cut["over"] for cut in figures["cuts"] if cut["max_length"] == 512) == 0.05


def test_a_limit_far_above_all_groups_is_said() -> None:
    _, (finding,) = review_lengths([group(10, 20, 30)] * 10, config(max_length=4096), seed=0)
    assert finding.level == "note" and finding.suggestion is not None
    assert finding.suggestion.settings == "--max_length 64"


def test_nothing_measured_is_nothing_said() -> None:
    assert review_lengths([], config(), seed=0) == ({}, [])
