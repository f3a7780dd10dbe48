"""Who lacks a collective, by the numbers of each process group."""

from __future__ import annotations

import pytest
import torch

from rm_scale.training.collective_progress import (
    GroupCount,
    compare_counts,
    count_collectives,
    since,
    waiting_blocks_the_host,
)


def world(given: int, group: str = "0", backend: str = "nccl") -> GroupCount:
    """The number of a group of all ranks."""
    return GroupCount(group, backend, None, given)


def part(given: int, group: str, *ranks: int) -> GroupCount:
    """The number of a group of some ranks."""
    return GroupCount(group, "nccl", list(ranks), given)


def names(counts: dict[int, list[GroupCount]]) -> tuple[list[int], list[int]]:
    """The ranks that are missing, and those that lack a collective but wait themselves."""
    found = compare_counts(counts)
    return [lag.rank for lag in found.missing], [lag.rank for lag in found.behind]


def test_the_rank_with_fewer_is_missing() -> None:
    """The others may have run on by different numbers: under NCCL the host goes ahead of its GPU."""
    counts = {0: [world(42)], 1: [world(41)], 2: [world(42)]}
    assert names(counts) == ([1], [])
    (lag,) = compare_counts(counts).missing
    assert str(lag) == "41 of 42 collectives of group 0 (nccl)"
    assert names({0: [world(45)], 1: [world(41)], 2: [world(42)]}) == ([1], [2])


def test_several_may_be_missing() -> None:
    assert names({0: [world(42)], 1: [world(41)], 2: [world(41)]}) == ([1, 2], [])


def test_equal_numbers_name_nobody() -> None:
    found = compare_counts({0: [world(42), world(7, "1")], 1: [world(42), world(7, "1")]})
    assert (found.missing, found.behind, found.is_crossed) == ([], [], False)
    assert found.totals == {"0 (nccl)": 42, "1 (nccl)": 7}


def test_a_chain_leads_to_the_rank_that_waits_for_nobody() -> None:
    """0 waits for 1 in their group, and 1 for 2 in theirs: only 2 keeps anybody waiting."""
    counts = {
        0: [part(5, "a", 0, 1)],
        1: [part(4, "a", 0, 1), part(9, "b", 1, 2)],
        2: [part(8, "b", 1, 2)],
    }
    assert names(counts) == ([2], [1])


def test_the_group_in_which_a_rank_lacks_most_is_quoted() -> None:
    found = compare_counts({0: [world(12), world(30, "1")], 1: [world(11), world(20, "1")]})
    assert [str(lag) for lag in found.missing] == ["20 of 30 collectives of group 1 (nccl)"]


def test_ranks_that_wait_for_each_other_are_crossed() -> None:
    found = compare_counts({0: [world(5), world(2, "1")], 1: [world(4), world(3, "1")]})
    assert found.is_crossed and [lag.rank for lag in found.behind] == [0, 1]


def test_a_group_that_a_member_does_not_know_yet_has_given_it_none() -> None:
    assert names({0: [world(5), world(1, "1")], 1: [world(5)]}) == ([1], [])
    assert names({0: [world(5), world(0, "1")], 1: [world(5)]}) == ([], [])
    # Rank 2 is no member of that group, and rank 3 told no numbers at all.
    counts = {0: [world(5), part(1, "a", 0, 1)], 1: [world(5), part(1, "a", 0, 1)], 2: [world(5)], 3: []}
    assert names(counts) == ([], [])


def test_two_backends_of_one_group_are_counted_apart() -> None:
    """As torch makes them for "cpu:gloo,cuda:nccl"."""
    counts = {rank: [world(5), world(given, backend="gloo")] for rank, given in enumerate((3, 2))}
    assert names(counts) == ([1], [])
    assert str(compare_counts(counts).missing[0]) == "2 of 3 collectives of group 0 (gloo)"


def test_only_what_was_given_since_counts() -> None:
    before = [world(40), world(3, "1")]
    assert since([world(42), world(3, "1"), world(1, "2")], before) == [world(2), world(0, "1"), world(1, "2")]


def test_real_groups_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gloo group of this process alone, and a second one; none at all before and under torch's detailed checks."""
    distributed = torch.distributed
    if distributed.is_initialized():
        distributed.destroy_process_group()
    assert count_collectives() == [] and not waiting_blocks_the_host()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert waiting_blocks_the_host()
        second = distributed.new_group([0])
        distributed.all_reduce(torch.ones(1))
        distributed.all_reduce(torch.ones(1), group=second)
        distributed.barrier(group=second)
        counts = count_collectives()
        assert [(count.backend, count.ranks, count.given) for count in counts] == [("gloo", None, 1), ("gloo", None, 2)]
        assert len({count.group for count in counts}) == 2
        level = distributed.get_debug_level()
        distributed.set_debug_level(distributed.DebugLevel.DETAIL)
        assert count_collectives() == []
        distributed.set_debug_level(level)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("cls", [torch._C._distributed_c10d.ProcessGroup, torch._C._distributed_c10d.Backend])
def test_torch_still_numbers_collectives(cls: type) -> None:
    """The name is torch's own and may change; NCCL's backend inherits it from here, and can't be made without a GPU."""
    assert callable(cls._get_sequence_number_for_group)  # type: ignore[attr-defined]
