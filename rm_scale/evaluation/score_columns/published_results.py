"""Hold our decisions against those that a file of published results states itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rm_scale.json_values import as_number
from rm_scale.logs import get_logger
from rm_scale.training.pair_counts import ScoredGroup

logger = get_logger(__name__)
_COLUMN = "results"


def compare_with_published(
    rows: Sequence[Mapping[str, Any]], groups: Sequence[ScoredGroup], name: str, how: str
) -> None:
    """Warn where a row's own `results` (1 right, 0 wrong, as RewardBench writes) is not what its scores say.

    Args:
        rows, groups: the rows that are used, and what was made of each.
        name, how: of the file, and how its scores were read.
    """
    compared, other = 0, []
    for number, (row, group) in enumerate(zip(rows, groups, strict=True)):
        stated = row.get(_COLUMN)
        value = float(stated) if isinstance(stated, bool) else as_number(stated)
        if value is None or group.soft_label is not None:
            continue
        compared += 1
        if not any(abs(value - ours) < 1e-6 for ours in _credits(group)):
            other.append(number)
    if other:
        shown = ", ".join(map(str, other[:5]))
        logger.warning(
            f"{name}, {how}: in {len(other):,} of {compared:,} rows the file's own column {_COLUMN} is not what the "
            f"scores say (the {shown}. of those used, from 0). The scores are used; check that it is their column."
        )
    elif compared:
        logger.info(f"{name}, {how}: the file's own column {_COLUMN} agrees in all {compared:,} rows.")


def _credits(group: ScoredGroup) -> tuple[float, ...]:
    """Return what may be stated: every good answer above every bad one, or a share of the highest score."""
    best = min(group.ranks)
    good = [reward for reward, rank in zip(group.rewards, group.ranks, strict=True) if rank == best]
    bad = [reward for reward, rank in zip(group.rewards, group.ranks, strict=True) if rank != best]
    top = max(group.rewards)
    shared = 1 / list(group.rewards).count(top) if good and max(good) == top else 0.0
    return float(not bad or min(good) > max(bad)), shared, float(not bad or max(good) > max(bad))
