"""Count the collectives of each process group: the counts tell which rank lacks one, whatever its stack shows.

torch numbers the collectives of a group when they are called, under gloo as under NCCL, those of DDP and DeepSpeed
included. Under NCCL a call returns at once and the host waits later, in `.item()` or a copy, so that a stack says
little; the numbers say who was here and who was not. They are read from the host's memory alone: torch's own notes on
which collectives have completed are not asked for, since that queries CUDA events, which can block behind the very
thread that hangs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GroupCount:
    """The collectives that a process group has been given on this rank.

    Attributes:
        group: torch's name of the group, the same on every rank.
        backend: gloo, nccl, ...
        ranks: global ranks of its members; `None` for all ranks of the run.
        given: how many, counted when they are called and not when they end.
    """

    group: str
    backend: str
    ranks: list[int] | None
    given: int

    @property
    def key(self) -> str:
        """A name that tells this group from the others."""
        return f"{self.group} ({self.backend})"


@dataclass(frozen=True)
class Lag:
    """A rank that has been given fewer collectives of a group than another member.

    Attributes:
        rank: which one.
        key: of the group in which it lacks most.
        given: to this rank.
        due: given to the member that has most.
    """

    rank: int
    key: str
    given: int
    due: int

    def __str__(self) -> str:
        return f"{self.given} of {self.due} collectives of group {self.key}"


@dataclass(frozen=True)
class Comparison:
    """What the numbers of the ranks that answer say.

    Attributes:
        missing: ranks that others wait for and that wait for nobody: these did not reach the collective.
        behind: other ranks that lack a collective, but are ahead of some rank: they wait themselves, or are late too.
        totals: the highest number of each group, by its key.
    """

    missing: list[Lag]
    behind: list[Lag]
    totals: dict[str, int]

    @property
    def is_crossed(self) -> bool:
        """True when ranks wait for each other, each in another group."""
        return bool(self.behind) and not self.missing


def count_collectives() -> list[GroupCount]:
    """Return the numbers of every group that this rank is in; none where there are no numbers to be had.

    Under gloo sends and receives count too, and only for the two ranks that take part. `since` takes away what was
    counted before; there are none while this project trains.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return []
    if distributed.get_debug_level() == distributed.DebugLevel.DETAIL:
        # torch then lets the ranks meet before it calls, and counts, the collective: all numbers would be equal.
        return []
    from torch.distributed import distributed_c10d

    world = distributed.get_world_size()
    counts = []
    for group in list(distributed_c10d._world.pg_map):
        ranks = distributed.get_process_group_ranks(group)
        members = None if len(ranks) == world else ranks
        # A group may hold one backend for processors and another for GPUs, each with numbers of its own.
        with contextlib.suppress(RuntimeError):  # a backend that doesn't count
            backends = {id(backend): backend for backend in map(group._get_backend, group._device_types)}
            for backend in backends.values():
                given = backend._get_sequence_number_for_group()  # type: ignore[attr-defined]
                counts.append(GroupCount(group.group_name, backend.name(), members, given))
    return counts


def since(counts: Sequence[GroupCount], before: Sequence[GroupCount]) -> list[GroupCount]:
    """Return what the groups have been given since `before`, which all ranks took at the same place of the program."""
    earlier = {count.key: count.given for count in before}
    return [GroupCount(c.group, c.backend, c.ranks, c.given - earlier.get(c.key, 0)) for c in counts]


def waiting_blocks_the_host() -> bool:
    """Return whether a waiting rank stands in the collective's call. It does under gloo; NCCL lets the GPU wait."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo"


def compare_counts(counts: Mapping[int, Sequence[GroupCount]]) -> Comparison:
    """Find the ranks that lack a collective.

    Ranks that run the same program stand in one order: who is furthest behind lacks in some group and is ahead in none.

    Args:
        counts: of each rank that answers.
    """
    worst: dict[int, Lag] = {}
    ahead: set[int] = set()
    totals: dict[str, int] = {}
    for key, members in _by_group(counts).items():
        due, least = max(members.values()), min(members.values())
        totals[key] = due
        for rank, given in members.items():
            known = worst.get(rank)
            if given < due and (known is None or due - given > known.due - known.given):
                worst[rank] = Lag(rank, key, given, due)
            if given > least:
                ahead.add(rank)
    lags = [worst[rank] for rank in sorted(worst)]
    return Comparison(
        [lag for lag in lags if lag.rank not in ahead], [lag for lag in lags if lag.rank in ahead], totals
    )


def _by_group(counts: Mapping[int, Sequence[GroupCount]]) -> dict[str, dict[int, int]]:
    """Return the numbers of each group by rank; a member that doesn't know the group yet has been given none."""
    with_numbers = {rank for rank, groups in counts.items() if groups}
    found: dict[str, dict[int, int]] = {}
    for rank in with_numbers:
        for count in counts[rank]:
            if count.key not in found:
                members = with_numbers if count.ranks is None else with_numbers.intersection(count.ranks)
                found[count.key] = dict.fromkeys(members, 0)
            found[count.key][rank] = count.given
    return found
