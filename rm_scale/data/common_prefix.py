"""How much texts, or sequences of token ids, begin with alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Sequences = TypeVar("Sequences", str, list[int], Sequence[int])


def common_prefix_length(sequences: Sequence[Sequences], leave: int = 0) -> int:
    """Return how many leading characters or token ids all sequences share.

    By halves, since to compare slices takes far less time than to compare one by one.

    Args:
        sequences: one or more.
        leave: number at the end of each sequence that never count as shared.
    """
    first = sequences[0]
    same = max(min(map(len, sequences)) - leave, 0)
    for other in sequences[1:]:
        if first[:same] == other[:same]:
            continue
        low, high = 0, same  # the first `low` are the same, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            if first[low:middle] == other[low:middle]:
                low = middle
            else:
                high = middle
        same = low
    return same
