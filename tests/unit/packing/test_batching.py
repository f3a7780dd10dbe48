"""The global batch is the same however it is cut up."""

from __future__ import annotations

import pytest

from rm_scale.packing.batching import StepBatchSampler


def steps(
    num_groups: int, micro: int, accumulation: int, world: int, epoch: int = 0, shuffle: bool = True
) -> list[set[int]]:
    """The sets of counted groups of each optimizer step."""
    ranks = []
    for rank in range(world):
        sampler = StepBatchSampler(num_groups, micro, accumulation, rank, world, shuffle, seed=7)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        ranks.append(batches)
    assert len({len(batches) for batches in ranks}) == 1, "every rank takes the same number of micro-steps"
    result = []
    for start in range(0, len(ranks[0]), accumulation):
        refs = [ref for batches in ranks for batch in batches[start : start + accumulation] for ref in batch]
        counted = [ref.row for ref in refs if ref.counted]
        assert len(counted) == len(set(counted)), "no group counts twice"
        result.append(set(counted))
    return result


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8)])
def test_steps_hold_the_same_groups_for_every_split(micro: int, accumulation: int, world: int) -> None:
    assert steps(37, micro, accumulation, world) == steps(37, 8, 1, 1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_group_counts_once_in_an_epoch(world: int) -> None:
    taken = [index for step in steps(23, 2, 2, world) for index in step]
    assert sorted(taken) == list(range(23))


def test_epochs_have_different_orders_that_can_be_had_again() -> None:
    first, second = steps(50, 5, 1, 1, epoch=0), steps(50, 5, 1, 1, epoch=1)
    assert first != second
    assert first == steps(50, 5, 1, 1, epoch=0)


def test_without_shuffling_the_order_is_the_files() -> None:
    assert steps(6, 2, 1, 1, shuffle=False) == [{0, 1}, {2, 3}, {4, 5}]


def test_micro_batches_are_always_full() -> None:
    sampler = StepBatchSampler(5, 2, 1, rank=1, world_size=2, shuffle=False, seed=0)
    last = list(sampler)[-1]
    assert [ref.counted for ref in last] == [False, False]
    assert [ref.row for ref in last] == [4, 4]
