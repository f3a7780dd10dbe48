"""Move micro-batches to a device: pinned on the host, then copied without making the host wait."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data._utils.pin_memory import pin_memory


def pin_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch in page-locked memory, from which a GPU copies by itself; as it is for other devices.

    A data loader does this by itself; it is for batches that are made beside one.
    """
    pinned: dict[str, Any] = pin_memory(batch) if device.type == "cuda" else batch
    return pinned


def move_batch(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return a collator's batch with all tensors on the device, in the types that the collator chose.

    The copies are queued behind the device's work. The host waits for them only where the batch isn't pinned.

    Args:
        batch: of a collator in `rm_scale.batching.collator`, or a step's `micro_batches`, which are moved one by one
            when their turn comes.
        device: where the model is.
    """
    return {name: _moved(value, device) for name, value in batch.items()}


def _moved(value: Any, device: torch.device | str) -> Any:
    """Move tensors, and what knows how to move the tensors it holds."""
    move = getattr(value, "to", None)
    return move(device, non_blocking=True) if move is not None else value
