"""Items of a benchmark that have no reward: they count as lost, and are counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rm_scale.errors import DataError
from rm_scale.evaluation.benchmarks.benchmark import Benchmark


def score_with_lost(
    benchmark: Benchmark,
    found: Sequence[list[float] | Exception],
    max_rejected_share: float,
    name: str,
    whose: str,
    fix: str,
) -> dict[str, Any]:
    """Return a benchmark's numbers; see `Benchmark.score`. An item without rewards counts as lost.

    A benchmark without some of its items would be another benchmark, and an easier one for a model that can't read
    long answers.

    Args:
        benchmark: items and rule.
        found: of each item its rewards, or what says why there are none.
        max_rejected_share: most items that may be lost in this way.
        name, whose, fix: for the message: the benchmark's file, who has no rewards, and how there would be some.

    Returns:
        What `Benchmark.score` returns, with `num_items` and `num_unscored`.

    Raises:
        DataError: more of them have no rewards.
    """
    refused = [place for place, rewards in enumerate(found) if isinstance(rewards, Exception)]
    if len(refused) > max_rejected_share * len(found):
        share = math.ceil(1000 * len(refused) / len(found)) / 1000
        first = f"the first is item {benchmark.items[refused[0]].id}: {found[refused[0]]}"
        raise DataError(
            f"{name}: {len(refused)} of {len(found)} items {whose}; {first}. Fix: {fix}, or let them count as lost "
            f"with --max_rejected_share {share:g}."
        )
    rewards = [
        [float(place >= item.num_correct) for place in range(len(item.completions))]
        if isinstance(values, Exception)
        else values
        for item, values in zip(benchmark.items, found, strict=True)
    ]
    return {**benchmark.score(rewards), "num_items": len(found), "num_unscored": len(refused)}
