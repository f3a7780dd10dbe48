"""Hyper-parameters by model size, applied where the user gave none.

The values are the reward-model guide's: below 1B 2e-5 and 4-8 pairs per device, 1-7B 1e-5 and 2-4, 7-13B 5e-6 and 1-2.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeTier:
    """Default hyper-parameters for models of up to `max_parameters` parameters.

    Attributes:
        name: what the tier is called in logs.
        max_parameters: upper bound, inclusive, of backbone parameters.
        learning_rate: peak learning rate.
        per_device_train_batch_size: groups per micro-batch and device.
        num_train_epochs: passes over the data.
    """

    name: str
    max_parameters: float
    learning_rate: float
    per_device_train_batch_size: int
    num_train_epochs: float


# Models called 7B have up to 7.1e9 backbone parameters and belong to the middle tier; those called 8B to the last.
SIZE_TIERS = (
    SizeTier("below 1B", 1e9, 2e-5, 8, 1.0),
    SizeTier("1-7B", 7.2e9, 1e-5, 4, 1.0),
    SizeTier("7-13B", float("inf"), 5e-6, 2, 1.0),
)


def size_tier(num_parameters: int) -> SizeTier:
    """The tier of a model with this many backbone parameters."""
    return next(tier for tier in SIZE_TIERS if num_parameters <= tier.max_parameters)
