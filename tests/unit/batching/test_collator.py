"""The padded layout, small enough to check by hand."""

from __future__ import annotations

import torch

from rm_scale.batching.collator import PaddedCollator
from rm_scale.batching.group_pairs import Pair, group_pairs


def test_rows_are_padded_on_the_right() -> None:
    groups = [
        {"input_ids": [[5, 6, 7], [5, 8]], "ranks": [0, 1], "margin": None, "soft_label": None, "index": 3},
        {"input_ids": [[5, 9], [5, 4, 4, 4]], "ranks": [1, 0], "margin": 0.5, "soft_label": None, "index": 1},
    ]
    batch = PaddedCollator(pad_token_id=0, pad_to_multiple_of=5)(groups)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [5, 8, 0, 0, 0], [5, 9, 0, 0, 0], [5, 4, 4, 4, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 2, 2, 4]
    assert batch["pair_better"].tolist() == [0, 3]
    assert batch["pair_worse"].tolist() == [1, 2]
    assert batch["pair_margin"].tolist() == [0.0, 0.5]
    assert batch["row_group"].tolist() == [0, 0, 1, 1]
    assert batch["group_index"].tolist() == [3, 1]


def test_fillers_have_rows_but_no_pairs() -> None:
    group = {"input_ids": [[1], [2]], "ranks": [0, 1], "margin": None, "soft_label": None, "index": 0, "counted": False}
    batch = PaddedCollator(pad_token_id=0)([group])
    assert batch["pair_better"].numel() == 0
    assert batch["row_group"].tolist() == [-1, -1]


def test_soft_label_below_half_turns_the_pair_round() -> None:
    assert group_pairs([0, 1], None, 0.2, keep_ties=True) == [Pair(1, 0, target=0.8)]
    assert group_pairs([0, 1], None, 0.5, keep_ties=False) == []


def test_labels_are_plain_tensors() -> None:
    group = {"input_ids": [[1, 2], [3]], "ranks": [0, 0], "margin": None, "soft_label": None, "index": 0}
    batch = PaddedCollator(pad_token_id=0)([group])
    assert all(isinstance(value, torch.Tensor) for name, value in batch.items() if name != "tokens")
    assert batch["pair_target"].tolist() == [0.5]
