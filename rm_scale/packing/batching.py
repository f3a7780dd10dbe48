"""Which groups make up an optimizer step, and which rank and micro-step takes which of them.

The global batch is fixed by sampler order alone; ranks and micro-steps only cut it up, so the same groups meet in a
step whatever the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
from torch.utils.data import DataLoader, Dataset


class GroupRef(NamedTuple):
    """One place in a micro-batch.

    Attributes:
        row: row of the data set.
        counted: False for a filler that keeps all ranks at the same number of micro-steps and adds nothing to the loss.
    """

    row: int
    counted: bool


class GroupDataset(Dataset[dict[str, Any]]):
    """Encoded groups, looked up by `GroupRef`.

    Args:
        groups: rows with `input_ids`, `ranks`, `margin`, `soft_label` (see `rm_scale.data.preparation`).
    """

    def __init__(self, groups: datasets.Dataset) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, ref: GroupRef) -> dict[str, Any]:
        return {**self.groups[ref.row], "index": ref.row, "counted": ref.counted}


class StepBatchSampler:
    """This rank's micro-batches of an epoch, in order.

    Micro-step m of a step gives rank r the groups `[(m * world_size + r) * micro_batch_size, ...)` of the step's
    global batch. The last step of an epoch may be smaller; it is filled up with uncounted groups, since under ZeRO-3 a
    rank that runs out of micro-steps would leave the others waiting.

    Args:
        num_groups: size of the data set.
        micro_batch_size: groups per micro-step and rank.
        accumulation_steps: micro-steps per optimizer step.
        rank, world_size: this process's place.
        shuffle: a new order in each epoch, from `seed` and the epoch alone.
        seed: seed of the order.
    """

    def __init__(
        self,
        num_groups: int,
        micro_batch_size: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.num_groups = num_groups
        self.batch_size = micro_batch_size
        self.accumulation_steps = accumulation_steps
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.drop_last = False

    @property
    def groups_per_micro_step(self) -> int:
        """Groups that all ranks together take in one micro-step."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Micro-steps in an epoch, the same on every rank."""
        return math.ceil(self.num_groups / self.groups_per_micro_step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def order(self) -> np.ndarray:
        """Indices of all groups in this epoch's order, shape `(num_groups,)`."""
        if not self.shuffle:
            return np.arange(self.num_groups)
        return np.random.Generator(np.random.Philox(key=[self.seed, self.epoch])).permutation(self.num_groups)

    def __iter__(self) -> Iterator[list[GroupRef]]:
        order = self.order()
        for start in range(0, self.num_groups, self.groups_per_micro_step):
            mine = start + self.rank * self.batch_size
            places = range(mine, mine + self.batch_size)
            yield [
                GroupRef(int(order[place]), True) if place < self.num_groups else GroupRef(int(order[start]), False)
                for place in places
            ]


class EpochDataLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` that passes the epoch on to its batch sampler, as transformers' loop expects."""

    def set_epoch(self, epoch: int) -> None:
        """See `StepBatchSampler.set_epoch`."""
        sampler = self.batch_sampler
        assert isinstance(sampler, StepBatchSampler)
        sampler.set_epoch(epoch)
