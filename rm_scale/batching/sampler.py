"""Which groups make up an optimizer step, and which rank and micro-step takes which of them.

The global batch is fixed by sampler order alone; ranks and micro-steps only cut it up, so the same groups meet in a
step whatever the number of ranks. How it is cut depends on the layout: padded rows in micro-batches of one size, packed
rows so that all ranks carry about the same number of tokens under a budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rm_scale.batching.balancing import split_balanced, split_in_order
from rm_scale.batching.collator import PackedCollator, PaddedCollator
from rm_scale.batching.packed.layout import packed_length

IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


class GroupRef(NamedTuple):
    """One place in a micro-batch.

    Attributes:
        row: row of the data set.
        counted: False for a filler that keeps all ranks at the same number of micro-steps and adds nothing to the loss.
    """

    row: int
    counted: bool


@dataclass(frozen=True)
class FixedSplit:
    """Micro-batches of one size: in micro-step m rank r takes a step's groups `[(m * world_size + r) * size, ...)`.

    Attributes:
        micro_batch_size: groups per micro-step and rank.
        world_size: number of ranks.
    """

    micro_batch_size: int
    world_size: int

    def __call__(self, rows: IntArray, rank: int) -> list[list[GroupRef]]:
        """Return this rank's micro-batches of the step made of `rows`; the last are filled up with uncounted groups."""
        together = self.micro_batch_size * self.world_size
        micro_steps = []
        for first in range(0, len(rows), together):
            mine = first + rank * self.micro_batch_size
            places = range(mine, mine + self.micro_batch_size)
            micro_steps.append(
                [
                    GroupRef(int(rows[place]), True) if place < len(rows) else GroupRef(int(rows[first]), False)
                    for place in places
                ]
            )
        return micro_steps


@dataclass(frozen=True)
class TokenSplit:
    """Micro-batches of about the same number of tokens, under a budget.

    Attributes:
        group_tokens: `(num_groups,)` tokens of each group of the data set in a packed row.
        max_tokens: budget of one row.
        world_size: number of ranks.
    """

    group_tokens: IntArray
    max_tokens: int
    world_size: int

    def __call__(self, rows: IntArray, rank: int) -> list[list[GroupRef]]:
        """Return this rank's micro-batches of the step made of `rows`: as many as every other rank's."""
        tokens = self.group_tokens[rows]
        micro_steps = []
        for ranks in split_balanced(tokens.tolist(), self.world_size, self.max_tokens):
            mine = [GroupRef(int(rows[place]), True) for place in ranks[rank]]
            # Without a group of its own a rank computes the shortest one, uncounted: nobody may skip a collective.
            micro_steps.append(mine or [GroupRef(int(rows[int(tokens.argmin())]), False)])
        return micro_steps


Split = FixedSplit | TokenSplit


@dataclass(frozen=True)
class Batching:
    """How groups become micro-batches.

    Attributes:
        groups_per_step: global batch size.
        split: cuts a step over ranks and micro-steps.
        collate: makes tensors of a micro-batch.
        eval_batch_size: groups per batch when scoring padded rows.
    """

    groups_per_step: int
    split: Split
    collate: PaddedCollator | PackedCollator
    eval_batch_size: int

    def scoring_batches(self, groups: datasets.Dataset) -> list[list[int]]:
        """Cut all rows of a data set into batches, longest groups first, which pads least."""
        tokens = np.asarray(groups["num_tokens"])
        if isinstance(self.collate, PackedCollator) and self.collate.share_prompts:
            sizes = np.asarray([len(ranks) for ranks in groups["ranks"]])
            tokens = packed_length(tokens, np.asarray(groups["prompt_length"]), sizes)
        order = np.argsort(-tokens, kind="stable").tolist()
        if isinstance(self.split, TokenSplit):
            parts = split_in_order(tokens[order].tolist(), self.split.max_tokens)
            return [[order[place] for place in part] for part in parts]
        size = self.eval_batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]


class StepDataset(Dataset[list[list[dict[str, Any]]]]):
    """This rank's share of an optimizer step: a list of micro-batches, each a list of encoded groups.

    It is looked up by the data set rows that make up the step in the whole world.

    Args:
        groups: rows with `input_ids`, `ranks`, `margin`, `soft_label` (see `rm_scale.data.preparation`).
        split: cuts a step into micro-batches.
        rank: whose share.
    """

    def __init__(self, groups: datasets.Dataset, split: Split, rank: int) -> None:
        self.groups = groups
        self.split = split
        self.rank = rank

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, rows: IntArray) -> list[list[dict[str, Any]]]:
        return [read_groups(self.groups, refs) for refs in self.split(rows, self.rank)]


def read_groups(groups: datasets.Dataset, refs: Sequence[GroupRef]) -> list[dict[str, Any]]:
    """Return the encoded groups at these places, with `index` and `counted`."""
    columns = groups[[ref.row for ref in refs]]
    return [
        {**{name: values[place] for name, values in columns.items()}, "index": ref.row, "counted": ref.counted}
        for place, ref in enumerate(refs)
    ]


class StepSampler:
    """The groups of each optimizer step of an epoch, the same on every rank.

    Its state is the epoch alone, so that a resumed run only skips steps. A step is handed on as an array of rows and
    cut into micro-batches where it is read, by the loader's workers if there are any.

    Args:
        num_groups: size of the data set.
        groups_per_step: global batch size; the last step of an epoch may be smaller.
        shuffle: a new order in each epoch, from `seed` and the epoch alone.
        seed: seed of the order.
    """

    def __init__(self, num_groups: int, groups_per_step: int, shuffle: bool, seed: int) -> None:
        self.num_groups = num_groups
        self.groups_per_step = groups_per_step
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        # What torch's and accelerate's loaders ask of a batch sampler.
        self.batch_size = 1
        self.drop_last = False

    def __len__(self) -> int:
        """Return the optimizer steps in an epoch."""
        return math.ceil(self.num_groups / self.groups_per_step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def order(self) -> IntArray:
        """Return the indices of all groups in this epoch's order, shape `(num_groups,)`."""
        if not self.shuffle:
            return np.arange(self.num_groups)
        return np.random.Generator(np.random.Philox(key=[self.seed, self.epoch])).permutation(self.num_groups)

    def __iter__(self) -> Iterator[list[IntArray]]:
        order = self.order()
        for start in range(0, self.num_groups, self.groups_per_step):
            yield [order[start : start + self.groups_per_step]]


class EpochDataLoader(DataLoader[list[list[dict[str, Any]]]]):
    """A `DataLoader` that passes the epoch on to its batch sampler, as transformers' loop expects."""

    def set_epoch(self, epoch: int) -> None:
        """See `StepSampler.set_epoch`."""
        sampler = self.batch_sampler
        assert isinstance(sampler, StepSampler)
        sampler.set_epoch(epoch)


@dataclass(frozen=True)
class StepCollator:
    """Make batches of a step's micro-batches.

    With sources a batch also holds `row_source` `(N,)`, the source of each response, and `source_groups` `(S,)`, the
    counted groups of each source, which stay on the host.

    Attributes:
        collate: builds the batch of one micro-batch.
        sources: `(num_groups,)` index of each group's source; `None` where each group says its own.
        num_sources: S; 0 to tell no sources apart.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    sources: IntArray | None = None
    num_sources: int = 0

    def __call__(self, steps: Sequence[list[list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
        (step,) = steps
        return {"micro_batches": [{**self.collate(groups), **self._origin(groups)} for groups in step]}

    def _origin(self, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not self.num_sources:
            return {}
        if self.sources is None:
            source = np.array([group["source"] for group in groups], dtype=np.int64)
        else:
            source = self.sources[[group["index"] for group in groups]].astype(np.int64)
        counted = np.array([group["counted"] for group in groups])
        sizes = [len(group["ranks"]) for group in groups]
        return {
            "row_source": torch.from_numpy(np.repeat(source, sizes)),
            "source_groups": np.bincount(source[counted], minlength=self.num_sources),
        }
