"""Ranks that keep the others waiting step after step, by how long each works outside collectives."""

from __future__ import annotations

from typing import Any

from rm_scale.distributed import gather_from_ranks
from rm_scale.logs import get_logger
from rm_scale.training.watchdog import Watchdog

logger = get_logger(__name__)

SLOW_RATIO = 1.5
"""A rank is named when it works this many times as long per step as the median rank."""


def name_slow_ranks(watchdog: Watchdog, seconds: float, is_first: bool = False) -> dict[str, Any]:
    """Compare how long each rank worked, and warn of those that keep the others waiting. A collective.

    Args:
        watchdog: of this rank; it knows which share of the time the rank was at work.
        seconds: that were spent training since the last log line.
        is_first: of this process: what ranks prepare once, such as compiled kernels, tells nothing of their nodes.

    Returns:
        `slow_ranks` for the log line; empty when there are none, or it can't be known.
    """
    if not watchdog.knows_work:  # the same on every rank; saves an object gather per log line under NCCL
        return {}
    share = watchdog.work_share()
    ranks = gather_from_ranks(None if share is None else share * seconds)
    if is_first or len(ranks) < 2 or None in ranks:
        return {}
    slow = slow_ranks(ranks)
    for rank, ratio in slow:
        logger.warning(slow_rank_text(rank, ranks[rank], ratio))
    return {"slow_ranks": [rank for rank, _ in slow]} if slow else {}


def slow_ranks(work_seconds: list[float], ratio: float = SLOW_RATIO) -> list[tuple[int, float]]:
    """Return the ranks that work much longer per step than the others, with how many times as long.

    Args:
        work_seconds: time of each rank not spent waiting for others, since the last log line.
        ratio: to the median rank (of an even number, the faster of the two in the middle).
    """
    median = sorted(work_seconds)[(len(work_seconds) - 1) // 2]
    if median <= 0:
        return []
    return [(rank, seconds / median) for rank, seconds in enumerate(work_seconds) if seconds > ratio * median]


def slow_rank_text(rank: int, seconds: float, ratio: float) -> str:
    """Return the log line of a slow rank: what was measured, and nothing beyond.

    Args:
        rank: which one.
        seconds: that it worked since the last log line.
        ratio: to the median rank.
    """
    return (
        f"[slow_rank] rank {rank} worked {seconds:.2f} s since the last log line, {ratio:.1f} times as long as the "
        "median rank (time outside collectives, from where its main thread was ten times a second). "
        "Look at its node: clock, other processes, disk."
    )
