"""Score token sequences with a loaded model: in training, after a save, and for `RewardScorer`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rm_scale.batching.balancing import split_in_order
from rm_scale.batching.device_transfer import move_batch, pin_batch
from rm_scale.batching.packed.attention import index_names
from rm_scale.batching.packed.index_arrays import prepare_index
from rm_scale.batching.packed.layout import common_prefix_length, pack_row, packed_length
from rm_scale.batching.padding import pad_right
from rm_scale.modeling.scoring_contract import ScoringContract

# Rows are rounded up to a multiple of this, so that kernels meet fewer shapes.
_ROW_MULTIPLE = 16


def as_in_training(
    contract: ScoringContract, device_type: str, loaded_in: str | None = None
) -> contextlib.AbstractContextManager[object]:
    """Return a context with products in the run's type: out of its autocast a reward can move by 0.4.

    Args:
        contract: knows the run's type.
        device_type: "cpu" or "cuda".
        loaded_in: type of the backbone's weights as they were loaded; default the contract's.
    """
    if (loaded_in or contract.dtype) == "float32" and contract.compute_dtype in {"bfloat16", "float16"}:
        return torch.autocast(device_type, dtype=getattr(torch, contract.compute_dtype))
    return contextlib.nullcontext()


def batch_rewards(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return rewards `(N,)` in fp32 of the N responses of a batch, padded or packed (`rm_scale.batching.collator`)."""
    names = ("input_ids", "attention_mask", "position_ids", "score_index", "packed_layout")
    inputs = {name: batch[name] for name in names if name in batch}
    rewards: torch.Tensor = model(**inputs, use_cache=False).logits[:, 0].float()
    return rewards


@torch.no_grad()
def score_packed(
    model: torch.nn.Module,
    groups: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
    max_tokens: int,
    device: torch.device | str,
) -> list[list[float]]:
    """Return the rewards of groups of token sequences in packed rows, each group's common prefix computed once.

    Args:
        model: a model that takes packed rows (`rm_scale.modeling.packed_model`).
        groups: token sequences that begin alike; a group may be a single one.
        pad_token_id: what fills a row's end.
        max_tokens: most tokens of a row; a longer group gets a row of its own.
        device: where the model is.

    Returns:
        A reward per sequence, fp32, in the order of `groups`.
    """
    was_training = model.training
    model.eval()
    device = torch.device(device)
    arrays = index_names(model.config, device.type)
    groups = [[without_padding(sequence, pad_token_id) for sequence in group] for group in groups]
    lengths = [packed_length(sum(map(len, group)), common_prefix_length(group), len(group)) for group in groups]
    order = sorted(range(len(groups)), key=lambda number: -lengths[number])
    scores: list[list[float]] = [[] for _ in groups]
    for part in split_in_order([lengths[number] for number in order], max_tokens):
        members = [order[place] for place in part]
        row = pack_row([groups[number] for number in members], True, pad_token_id, _ROW_MULTIPLE)
        batch = {
            "input_ids": row.input_ids,
            "position_ids": row.position_ids,
            "score_index": row.score_index,
            "packed_layout": prepare_index(row.layout, arrays),
        }
        batch = move_batch(pin_batch(batch, device), device)
        flat = batch_rewards(model, batch).tolist()
        for number in members:
            scores[number], flat = flat[: len(groups[number])], flat[len(groups[number]) :]
    model.train(was_training)
    return scores


def without_padding(sequence: Sequence[int], pad_token_id: int) -> Sequence[int]:
    """Return a sequence up to its last token that is not padding, where transformers reads the score; never nothing.

    Only a plain model whose padding is EOS has sequences that end so.
    """
    end = len(sequence)
    while end > 1 and sequence[end - 1] == pad_token_id:
        end -= 1
    return sequence if end == len(sequence) else sequence[:end]


@torch.no_grad()
def score_sequences(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    batch_size: int,
    device: torch.device | str,
) -> list[float]:
    """Return the rewards of token sequences, in their order, fp32.

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
