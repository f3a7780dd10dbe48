"""The pairs of the sample as arrays, and how often the better response of a pair has something that the other lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rm_scale.data_review.sample import SampledGroup
from rm_scale.evaluation.resampling import accuracy_interval, interval_of
from rm_scale.overlap.normalisation import exact_key

IntArray = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
FEWEST_PAIRS = 30
"""Below this many decided pairs an interval says too little to be called a bias."""


@dataclass(frozen=True)
class SampledPairs:
    """P pairs of G groups with R responses in all.

    Attributes:
        groups: the G groups.
        responses: R texts, group after group.
        group: (P,) number of each pair's group.
        better, worse: (P,) places of its responses among all R.
        prompt: (P,) number of its prompt; pairs of one prompt are alike.
    """

    groups: Sequence[SampledGroup]
    responses: list[str]
    group: IntArray
    better: IntArray
    worse: IntArray
    prompt: IntArray

    @classmethod
    def of(cls, groups: Sequence[SampledGroup]) -> SampledPairs:
        """Return the pairs of these groups, in their order."""
        rows: list[tuple[int, int, int]] = []
        responses: list[str] = []
        prompts: list[int] = []
        for number, group in enumerate(groups):
            start = len(responses)
            responses += group.responses
            prompts.append(exact_key(group.prompt))
            rows += [(number, start + pair.better, start + pair.worse) for pair in group.pairs]
        table = np.asarray(rows, dtype=np.int64).reshape(-1, 3)
        _, prompt = np.unique(np.asarray(prompts, dtype=np.int64), return_inverse=True)
        return cls(groups, responses, table[:, 0], table[:, 1], table[:, 2], prompt.reshape(-1)[table[:, 0]])

    def __len__(self) -> int:
        return len(self.group)

    def preference(self, has: Mask) -> dict[str, Any]:
        """Return how often the better response has something, and how often it is the one that has it.

        Args:
            has: (R,) whether each response has it.
        """
        better, worse = has[self.better], has[self.worse]
        decided = better != worse
        return {
            "num_pairs": len(self),
            "share_better": float(better.mean()) if len(self) else None,
            "share_worse": float(worse.mean()) if len(self) else None,
            "num_only_better": int((better & ~worse).sum()),
            "num_only_worse": int((worse & ~better).sum()),
            **self.win_rate(better[decided], self.prompt[decided]),
        }

    def win_rate(self, wins: Mask | Floats, prompt: IntArray) -> dict[str, Any]:
        """Return the share of pairs that are wins, with a 95 % interval over prompts.

        Args:
            wins: (D,) 1 or 0 for the pairs that decide, or half of it.
            prompt: (D,) their prompts.
        """
        if not len(wins):
            return {"wins": None, "wins_ci95": None}
        credit = wins.astype(np.float64)
        bounds = accuracy_interval(credit, prompt) or interval_of(float(credit.sum()), len(credit))
        return {"wins": float(credit.mean()), "wins_ci95": bounds}

    def examples(self, chosen: Mask, count: int) -> list[SampledGroup]:
        """Return the groups of the first pairs that a mask (P,) chooses, each once."""
        return [self.groups[number] for number in dict.fromkeys(self.group[chosen].tolist())][:count]


def is_biased(rate: dict[str, Any], decided: int, by: float) -> bool:
    """Tell whether a win rate is surely away from a half, and by at least `by`."""
    if decided < FEWEST_PAIRS or rate["wins_ci95"] is None:
        return False
    low, high = rate["wins_ci95"]
    return abs(rate["wins"] - 0.5) >= by and not low <= 0.5 <= high
