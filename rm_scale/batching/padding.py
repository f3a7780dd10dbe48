"""Pad token sequences of different lengths to one rectangle, on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pad_right(sequences: Sequence[Sequence[int]], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Stack sequences into `input_ids` and `attention_mask` of shape `(len(sequences), longest)`, padded on the right.

    Args:
        sequences: token ids; none may end with the padding token.
        pad_token_id: what to pad with.
        multiple: round the width up to a multiple of this.
    """
    longest = max(len(sequence) for sequence in sequences)
    width = -(-longest // multiple) * multiple
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
        attention_mask[row, : len(sequence)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
