"""Make tensors of groups: padded rows, one per response, or one packed row, and the labels, the same for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rm_scale.batching.group_pairs import group_pairs
from rm_scale.batching.packed.index_arrays import prepare_index
from rm_scale.batching.packed.layout import IndexName, RowLayout, pack_row
from rm_scale.batching.padding import pad_right

Batch = dict[str, Any]
"""A micro-batch: the tensors of one of the collators below, and its `TokenCounts` under "tokens"."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a micro-batch on one rank. Fillers count as processed, and as nothing else.

    Attributes:
        processed: what the model computes, padding included.
        real: of these, tokens of counted groups.
        unshared: the same groups with the prompt counted once per response.
        squares: sum of the squared lengths of their sequences, for the cost of attention.
        attended: pairs of a query and a key that causal attention needs in this layout, padding included.
    """

    processed: int
    real: int
    unshared: int
    squares: int
    attended: int = 0


@dataclass(frozen=True)
class PaddedCollator:
    """One row per response, padded on the right to the longest.

    The batch holds, for N responses of G groups with P pairs:
    `input_ids`, `attention_mask` `(N, width)`; `pair_better`, `pair_worse` `(P,)` response numbers; `pair_target`,
    `pair_margin` `(P,)` fp32; `row_group`, `row_rank` `(N,)`; `group_index` `(G,)` rows of the data set. Groups that
    don't count have responses but no pairs, and `row_group` -1.

    Attributes:
        pad_token_id: what to pad with.
        pad_to_multiple_of: widths are rounded up to this.
        keep_ties: make pairs of equal rank too.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    keep_ties: bool = True

    def __call__(self, groups: Sequence[dict[str, Any]]) -> Batch:
        sequences = [ids for group in groups for ids in group["input_ids"]]
        tensors = pad_right(sequences, self.pad_token_id, self.pad_to_multiple_of)
        unshared, squares = _lengths(groups)
        return {
            **tensors,
            **comparison_labels(groups, self.keep_ties),
            "tokens": TokenCounts(tensors["input_ids"].numel(), unshared, unshared, squares, _triangles(tensors)),
        }


@dataclass(frozen=True)
class PackedCollator:
    """One row for all groups; see `rm_scale.batching.packed.layout`.

    The batch holds `input_ids`, `position_ids` `(1, width)`, `score_index` `(N,)` and `packed_layout`, and the same
    labels as `PaddedCollator`.

    Attributes:
        pad_token_id: what fills the row's end.
        share_prompts: each group's common prefix stands once.
        pad_to_multiple_of: the width is rounded up to this.
        keep_ties: make pairs of equal rank too.
        index_names: index arrays that the row takes along (`rm_scale.batching.packed.attention.index_names`). Others
            are made in the forward pass, which a GPU waits for.
    """

    pad_token_id: int
    share_prompts: bool
    pad_to_multiple_of: int = 1
    keep_ties: bool = True
    index_names: tuple[IndexName, ...] = ()

    def __call__(self, groups: Sequence[dict[str, Any]]) -> Batch:
        sequences = [group["input_ids"] for group in groups]
        row = pack_row(sequences, self.share_prompts, self.pad_token_id, self.pad_to_multiple_of)
        unshared, squares = _lengths(groups)
        # A rank's fillers come alone, so a row is counted as a whole or not at all.
        real = row.layout.num_tokens if unshared else 0
        return {
            "input_ids": row.input_ids,
            "position_ids": row.position_ids,
            "score_index": row.score_index,
            "packed_layout": prepare_index(row.layout, self.index_names),
            **comparison_labels(groups, self.keep_ties),
            "tokens": TokenCounts(row.layout.width, real, unshared, squares, attended_pairs(row.layout)),
        }


def _lengths(groups: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return the tokens, and the sum of squared lengths, of all sequences of the counted groups."""
    lengths = [len(ids) for group in groups if group.get("counted", True) for ids in group["input_ids"]]
    return sum(lengths), sum(length * length for length in lengths)


def _triangles(tensors: dict[str, torch.Tensor]) -> int:
    """Return the query-key pairs of padded rows, each as wide as the batch."""
    num_rows, width = tensors["input_ids"].shape
    return num_rows * width * (width + 1) // 2


def attended_pairs(layout: RowLayout) -> int:
    """Return the query-key pairs of a packed row: prompts once, each response with its prompt and itself."""
    pairs = 0
    for span in layout.spans:
        prompt = span.prompt_length
        pairs += prompt * (prompt + 1) // 2
        pairs += sum(length * prompt + length * (length + 1) // 2 for length in span.response_lengths)
    return pairs


def comparison_labels(groups: Sequence[dict[str, Any]], keep_ties: bool) -> dict[str, torch.Tensor]:
    """Return the label part of a batch: which rows are compared with which, and which group each row belongs to."""
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
