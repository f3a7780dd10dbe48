"""Scored groups as arrays of pairs: what every statistic of an evaluation is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rm_scale.batching.group_pairs import group_pairs
from rm_scale.training.pair_counts import ScoredGroup

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pairs:
    """P pairs whose label prefers one response, and T pairs whose label is a tie, of G groups.

    Attributes:
        margin: `(P,)` r_better - r_worse.
        target: `(P,)` probability by label that `better` is the better one, above 0.5; 1 for hard labels.
        length: `(P,)` tokens of better - tokens of worse; NaN where lengths are not known.
        group: `(P,)` number of the group.
        tie_margin: `(T,)` |difference of rewards| of label ties.
        tie_group: `(T,)` number of the group.
        prompt: `(G,)` number of each group's prompt; groups without a known prompt have one of their own.
    """

    margin: Floats
    target: Floats
    length: Floats
    group: Integers
    tie_margin: Floats
    tie_group: Integers
    prompt: Integers

    def __len__(self) -> int:
        return len(self.margin)

    @property
    def credit(self) -> Floats:
        """`(P,)` 1 where the better response has the strictly higher reward, else 0."""
        return (self.margin > 0).astype(np.float64)

    @property
    def cluster(self) -> Integers:
        """`(P,)` number of each pair's prompt."""
        return self.prompt[self.group]

    def of_groups(self, chosen: Mask) -> Pairs:
        """Return only the pairs of these groups.

        Args:
            chosen: `(G,)`.
        """
        return self._take(chosen[self.group], chosen[self.tie_group])

    def _take(self, pairs: Mask, ties: Mask) -> Pairs:
        return Pairs(
            self.margin[pairs],
            self.target[pairs],
            self.length[pairs],
            self.group[pairs],
            self.tie_margin[ties],
            self.tie_group[ties],
            self.prompt,
        )


def pairs_of(groups: Sequence[ScoredGroup]) -> Pairs:
    """Return all comparisons within the groups, in their order."""
    rows: list[tuple[float, float, float, int]] = []
    ties: list[tuple[float, int]] = []
    for number, group in enumerate(groups):
        for pair in group_pairs(group.ranks, group.margin, group.soft_label, keep_ties=True):
            difference = group.rewards[pair.better] - group.rewards[pair.worse]
            if pair.is_tie:
                ties.append((abs(difference), number))
                continue
            length = float(group.lengths[pair.better] - group.lengths[pair.worse]) if group.lengths else np.nan
            rows.append((difference, pair.target, length, number))
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
    tied = np.asarray(ties, dtype=np.float64).reshape(-1, 2)
    return Pairs(
        margin=table[:, 0],
        target=table[:, 1],
        length=table[:, 2],
        group=table[:, 3].astype(np.int64),
        tie_margin=tied[:, 0],
        tie_group=tied[:, 1].astype(np.int64),
        prompt=_prompt_numbers(groups),
    )


def _prompt_numbers(groups: Sequence[ScoredGroup]) -> Integers:
    numbers: dict[tuple[str, int], int] = {}
    keys = ((group.prompt, -1) if group.prompt else ("", place) for place, group in enumerate(groups))
    return np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
