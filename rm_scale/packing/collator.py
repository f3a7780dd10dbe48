"""Groups to tensors in the padded layout: one row per response, padded on the right to the longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rm_scale.packing.comparisons import group_pairs
from rm_scale.packing.padding import pad_right


@dataclass(frozen=True)
class PaddedCollator:
    """Build the batch of one micro-step.

    The batch holds, for N responses of G groups with P pairs:
    `input_ids`, `attention_mask` `(N, width)`; `pair_better`, `pair_worse` `(P,)` row numbers; `pair_target`,
    `pair_margin` `(P,)` fp32; `row_group`, `row_rank` `(N,)`; `group_index` `(G,)` rows of the data set. Groups that
    don't count have rows but no pairs, and `row_group` -1.

    Attributes:
        pad_token_id: what to pad with.
        pad_to_multiple_of: widths are rounded up to this.
        keep_ties: make pairs of equal rank too.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    keep_ties: bool = True

    def __call__(self, groups: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [ids for group in groups for ids in group["input_ids"]]
        return {
            **pad_right(sequences, self.pad_token_id, self.pad_to_multiple_of),
            **comparison_labels(groups, self.keep_ties),
        }


def comparison_labels(groups: Sequence[dict[str, Any]], keep_ties: bool) -> dict[str, torch.Tensor]:
    """The label part of a batch: which rows are compared with which, and which group each row belongs to."""
    better: list[int] = []
    worse: list[int] = []
    target: list[float] = []
    margin: list[float] = []
    row_group: list[int] = []
    row_rank: list[int] = []
    for number, group in enumerate(groups):
        first_row = len(row_group)
        counted = group.get("counted", True)
        row_group += [number if counted else -1] * len(group["ranks"])
        row_rank += list(group["ranks"])
        if not counted:
            continue
        for pair in group_pairs(group["ranks"], group.get("margin"), group.get("soft_label"), keep_ties):
            better.append(first_row + pair.better)
            worse.append(first_row + pair.worse)
            target.append(pair.target)
            margin.append(pair.margin)
    return {
        "pair_better": torch.tensor(better, dtype=torch.long),
        "pair_worse": torch.tensor(worse, dtype=torch.long),
        "pair_target": torch.tensor(target, dtype=torch.float32),
        "pair_margin": torch.tensor(margin, dtype=torch.float32),
        "row_group": torch.tensor(row_group, dtype=torch.long),
        "row_rank": torch.tensor(row_rank, dtype=torch.long),
        "group_index": torch.tensor([group["index"] for group in groups], dtype=torch.long),
    }
