"""From token sequences to rewards with a model at hand: used at training, after a save, and by the scorer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rm_scale.packing.padding import pad_right


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
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        rewards += model(**batch, use_cache=False).logits[:, 0].float().tolist()
    model.train(was_training)
    return rewards
