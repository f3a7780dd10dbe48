"""From token sequences to rewards with a model at hand: used at training, after a save, and by the scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rm_scale.packing.padding import pad_right


def batch_rewards(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Rewards `(N,)` in fp32 of the N responses of a batch, padded or packed (see `rm_scale.packing.collator`)."""
    names = ("input_ids", "attention_mask", "position_ids", "score_index", "packed_layout")
    inputs = {name: batch[name] for name in names if name in batch}
    rewards: torch.Tensor = model(**inputs, use_cache=False).logits[:, 0].float()
    return rewards


@torch.no_grad()
def score_sequences(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    batch_size: int,
    device: torch.device | str,
) -> list[float]:
    """Rewards of token sequences, in their order, fp32.

    Under ZeRO-3 every rank must call this with the same number of sequences and batch size, since each forward pass
    is a collective.
    """
    was_training = model.training
    model.eval()
    rewards: list[float] = []
    for start in range(0, len(sequences), batch_size):
        batch = pad_right(sequences[start : start + batch_size], pad_token_id)
        rewards += batch_rewards(model, {name: tensor.to(device) for name, tensor in batch.items()}).tolist()
    model.train(was_training)
    return rewards
