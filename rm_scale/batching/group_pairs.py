"""Turn the ranks of a group's responses into pairs to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Pair:
    """Two responses of a group.

    Attributes:
        better, worse: positions among the group's responses; for a tie their order means nothing.
        target: probability that `better` is the better one: 1 for a hard label, 0.5 for a tie, else a soft label.
        margin: how much better, 0 when unknown.
    """

    better: int
    worse: int
    target: float = 1.0
    margin: float = 0.0

    @property
    def is_tie(self) -> bool:
        """True when the label prefers neither."""
        return self.target == 0.5


def group_pairs(ranks: Sequence[int], margin: float | None, soft_label: float | None, keep_ties: bool) -> list[Pair]:
    """Return all K(K-1)/2 comparisons of a group (InstructGPT, arXiv 2203.02155, section 3.5).

    Args:
        ranks: K ranks, 0 is best; equal ranks are ties.
        margin: for K = 2, how much better the preferred response is.
        soft_label: for K = 2, probability that response 0 is better.
        keep_ties: return tied pairs too, with target 0.5.
    """
    if soft_label is not None:
        first_is_better = soft_label >= 0.5
        better, worse = (0, 1) if first_is_better else (1, 0)
        pairs = [Pair(better, worse, max(soft_label, 1.0 - soft_label))]
    else:
        pairs = [_ranked_pair(a, b, ranks, margin) for a, b in combinations(range(len(ranks)), 2)]
    return pairs if keep_ties else [pair for pair in pairs if not pair.is_tie]


def _ranked_pair(a: int, b: int, ranks: Sequence[int], margin: float | None) -> Pair:
    if ranks[a] == ranks[b]:
        return Pair(a, b, target=0.5)
    better, worse = (a, b) if ranks[a] < ranks[b] else (b, a)
    return Pair(better, worse, margin=margin or 0.0)
