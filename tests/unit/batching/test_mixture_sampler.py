"""A mixture has its shares exactly, in each step and in total, and follows from seed, epoch and step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm_scale.batching.mixture_sampler import MixtureSampler
from rm_scale.batching.sampler import FixedSplit, IntArray, TokenSplit
from rm_scale.batching.share_schedule import ShareSchedule
from rm_scale.data.mixture import Mixture, divide, first_of_each, repeated, weighted
from rm_scale.errors import DataError

checked = settings(deadline=None, max_examples=60, database=None, derandomize=True)
WEIGHTS = (0.4, 0.3, 0.2, 0.1)


def sources(*sizes: int) -> IntArray:
    return np.repeat(np.arange(len(sizes)), sizes)


def names(count: int) -> list[str]:
    return [f"s{number}" for number in range(count)]


def mix(sizes: tuple[int, ...], weights: tuple[float, ...], per_step: bool = True) -> Mixture:
    return weighted(names(len(sizes)), sources(*sizes), weights, per_step)


def steps_of(sampler: MixtureSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return [rows.tolist() for (rows,) in sampler]


@checked
@given(
    st.lists(st.one_of(st.integers(0, 12), st.integers(0, 10**6)), min_size=1, max_size=12).filter(any),
    st.one_of(st.integers(1, 9), st.sampled_from([16, 100, 512])),
)
def test_no_source_is_ever_a_whole_group_ahead_or_behind(rates: list[int], groups_per_step: int) -> None:
    schedule, total = ShareSchedule(rates, groups_per_step), sum(rates)
    for step in range(1, 300):
        counts = schedule.next_step()
        assert sum(counts) == groups_per_step
        for count, taken, rate in zip(counts, schedule.taken, rates, strict=True):
            assert abs(count * total - groups_per_step * rate) < total
            assert abs(taken * total - step * groups_per_step * rate) < total
    assert schedule.at(37).taken == ShareSchedule(rates, groups_per_step).at(37).taken
    assert schedule.at(310).next_step() == ShareSchedule(rates, groups_per_step).at(310).next_step()


@pytest.mark.parametrize("weights", [WEIGHTS, (1 / 3, 2 / 7, 0.05, 1.23456789)])
@pytest.mark.parametrize("groups_per_step", [1, 16])
def test_shares_over_ten_thousand_steps_are_exact_to_one_group(
    weights: tuple[float, ...], groups_per_step: int
) -> None:
    mixture = mix((500, 90, 700, 40), weights)
    sampler = MixtureSampler(mixture, groups_per_step, shuffle=True, seed=3)
    wanted = np.array(weights) / sum(weights) * groups_per_step
    total, steps, epoch = np.zeros(4), 0, 0
    while steps < 10_000:
        sampler.set_epoch(epoch)
        for (rows,) in sampler:
            counts = np.bincount(mixture.source[rows], minlength=4)
            total, steps = total + counts, steps + 1
            assert counts.sum() == groups_per_step
            assert np.abs(counts - wanted).max() < 1 + 1e-9
            assert np.abs(total - steps * wanted).max() < 1 + 1e-6, "across epochs too"
        epoch += 1


def test_an_epoch_ends_when_every_group_was_used_and_small_sources_begin_again_in_a_new_order() -> None:
    mixture = mix((100, 10), (0.5, 0.5))
    sampler = MixtureSampler(mixture, 8, shuffle=True, seed=1)
    assert len(sampler) == 25 and mixture.epoch_size(8) == 200
    used = [row for step in steps_of(sampler, 0) for row in step]
    assert sorted(Counter(row for row in used if row < 100).values()) == [1] * 100
    small = [row for row in used if row >= 100]
    assert set(Counter(small).values()) == {10}
    passes = [tuple(small[start : start + 10]) for start in range(0, 96, 10)]
    assert len(set(passes)) > 5, "each pass has an order of its own"


def test_a_fraction_of_a_source_goes_on_where_the_epoch_before_ended() -> None:
    mixture = repeated(names(2), sources(10, 7), (0.5, 1.5), per_step=True)
    assert mixture.counts == (5, 11)
    sampler = MixtureSampler(mixture, 4, shuffle=True, seed=1)
    both = Counter(row for epoch in (0, 1) for step in steps_of(sampler, epoch) for row in step)
    assert [both[row] for row in range(10)] == [1] * 10, "half of it in each epoch, then the other half"
    assert {both[row] for row in range(10, 17)} == {3, 4}
    assert [len(step) for step in steps_of(sampler, 0)] == [4, 4, 4, 4]


@pytest.mark.parametrize("per_step", [True, False])
def test_repeated_sources_are_used_that_often_in_each_epoch(per_step: bool) -> None:
    mixture = repeated(names(3), sources(20, 5, 7), (1, 3, 2), per_step)
    for groups_per_step in (1, 6, 1000):
        sampler = MixtureSampler(mixture, groups_per_step, shuffle=True, seed=9)
        for epoch in (0, 1):
            steps = steps_of(sampler, epoch)
            assert len(steps) == len(sampler)
            counts = Counter(row for step in steps for row in step)
            assert [{counts[row] for row in rows} for rows in (range(20), range(20, 25), range(25, 32))] == [
                {1},
                {3},
                {2},
            ]


def test_shares_per_epoch_are_counts_in_a_random_order() -> None:
    mixture = mix((60, 30), (0.75, 0.25), per_step=False)
    assert mixture.counts == (90, 30), "the second needs 120 groups to be used up"
    sampler = MixtureSampler(mixture, 10, shuffle=True, seed=1)
    steps = steps_of(sampler, 0)
    assert Counter(mixture.source[[row for step in steps for row in step]].tolist()) == {0: 90, 1: 30}
    assert len({tuple(sorted(mixture.source[step].tolist())) for step in steps}) > 1
    assert steps_of(sampler, 1) != steps


@pytest.mark.parametrize("per_step", [True, False])
def test_the_order_is_from_seed_epoch_and_step_alone(per_step: bool) -> None:
    mixture = mix((31, 17, 5), (0.5, 0.3, 0.2), per_step)
    sampler = MixtureSampler(mixture, 4, shuffle=True, seed=7)
    epochs = [steps_of(sampler, epoch) for epoch in range(4)]
    np.random.seed(1)
    assert steps_of(sampler, 1) == epochs[1], "going back to an epoch gives its order again"
    assert steps_of(MixtureSampler(mixture, 4, shuffle=True, seed=7), 3) == epochs[3], "a resumed run's first epoch"
    assert steps_of(MixtureSampler(mixture, 4, shuffle=True, seed=8), 0) != epochs[0]
    assert len({str(epoch) for epoch in epochs}) == 4


def test_without_shuffling_sources_are_read_in_their_order() -> None:
    sampler = MixtureSampler(mix((4, 2), (2, 1)), 3, shuffle=False, seed=0)
    assert steps_of(sampler, 0) == [[0, 1, 4], [2, 3, 5]]
    in_turn = MixtureSampler(repeated(names(2), sources(4, 2), (1, 2), per_step=False), 3, shuffle=False, seed=0)
    assert steps_of(in_turn, 0) == [[0, 1, 2], [3, 4, 5], [4, 5]]


@pytest.mark.parametrize("split", [FixedSplit, TokenSplit])
def test_ranks_share_a_mixed_step_whatever_their_number(split: type) -> None:
    mixture = mix((40, 12, 9), (0.6, 0.3, 0.1))
    sampler = MixtureSampler(mixture, 10, shuffle=True, seed=2)
    tokens = np.arange(61) % 7 + 3
    for rows in steps_of(sampler, 0):
        for world in (1, 2, 3):
            cut = split(2, world) if split is FixedSplit else split(tokens, 25, world)
            shares = [cut(np.array(rows), rank) for rank in range(world)]
            assert sorted(ref.row for share in shares for step in share for ref in step if ref.counted) == sorted(rows)
            assert len({len(share) for share in shares}) == 1


def test_a_source_without_weight_is_never_used() -> None:
    sampler = MixtureSampler(mix((10, 10, 1000), (0.5, 0.5, 0)), 4, shuffle=True, seed=2)
    assert max(row for step in steps_of(sampler, 0) for row in step) < 20


def test_a_source_without_groups_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"datasets: s1: no group of it is left to train on.*Fix: "):
        mix((4, 0), (1, 1))
    with pytest.raises(DataError, match=r"datasets: s1: no group of it is left"):
        repeated(names(2), sources(4, 0), (1, 1), per_step=True)
    with pytest.raises(DataError, match=r"s1: epochs=0.1 of 2 groups is less than half a group. Fix: a larger number"):
        repeated(names(2), sources(4, 2), (1, 0.1), per_step=True)


def test_weights_so_far_apart_that_no_epoch_ends_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"s1: at its weight 10,000,000,000,000,010 groups are drawn.*Fix: a larger wei"
    ):
        mix((4, 10), (1e9, 1e-6))
    assert mix((4, 10), (1e9, 1)).epoch_size(8) > 10**9, "max_steps may end it"


def test_limits_take_from_each_source_in_proportion() -> None:
    assert divide(10, [1, 1, 1]) == [4, 3, 3]
    assert divide(7, [5, 0, 2]) == [5, 0, 2]
    source = sources(60, 30, 10)
    kept = first_of_each(source, 10, 3)
    assert Counter(source[kept].tolist()) == {0: 6, 1: 3, 2: 1}
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 60, 61, 62, 90]
    assert len(first_of_each(source, None, 3)) == len(first_of_each(source, 1000, 3)) == 100
