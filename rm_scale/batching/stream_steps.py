"""The steps of a streamed run: each takes the next groups of the stream, and this rank reads its share of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from rm_scale.batching.packed.layout import packed_length
from rm_scale.batching.sampler import FixedSplit, IntArray, Split, TokenSplit
from rm_scale.batching.share_schedule import ShareSchedule
from rm_scale.data.stream import GroupStream

if TYPE_CHECKING:
    import pyarrow as pa

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class StreamSplit:
    """How the groups of a streamed step are cut up; their lengths are known only once they have been read.

    Attributes:
        micro_batch_size: groups per micro-step and rank, of padded rows.
        world_size: number of ranks.
        max_tokens: budget of a packed row; `None` for padded rows.
        share_prompts: each group's prompt stands once in a packed row.
    """

    micro_batch_size: int
    world_size: int
    max_tokens: int | None
    share_prompts: bool

    def of(self, groups: list[dict[str, Any]]) -> Split:
        """Return what cuts a step of these groups."""
        if self.max_tokens is None:
            return FixedSplit(self.micro_batch_size, self.world_size)
        tokens, prompts, sizes = np.array(
            [(group["num_tokens"], group["prompt_length"], len(group["ranks"])) for group in groups], dtype=np.int64
        ).T
        return TokenSplit(self._row_tokens(tokens, prompts, sizes), self.max_tokens, self.world_size)

    def fits(self, groups: pa.Table) -> BoolArray:
        """Tell of each group of a table, `(num_groups,)`, whether a row can hold it."""
        if self.max_tokens is None:
            return np.ones(len(groups), dtype=bool)
        sizes = groups["ranks"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        tokens, prompts = (groups[name].to_numpy().astype(np.int64) for name in ("num_tokens", "prompt_length"))
        return np.asarray(self._row_tokens(tokens, prompts, sizes.astype(np.int64)) <= self.max_tokens)

    def _row_tokens(self, tokens: IntArray, prompts: IntArray, sizes: IntArray) -> IntArray:
        """Return the tokens of each group in a packed row, `(num_groups,)`."""
        if not self.share_prompts:
            return tokens
        shared: IntArray = packed_length(tokens, prompts, sizes)
        return shared


class StepStream:
    """The groups of each step of a streamed run, the same on every rank.

    Args:
        parts: streams; those of a mixture are drawn from in its shares.
        rates: whole numbers in the proportion of the shares.
        groups_per_step: global batch size.
        seed: of the order inside a step of several streams; `None` keeps their order.
        num_steps: optimizer steps of the run.
    """

    def __init__(
        self, parts: Sequence[GroupStream], rates: Sequence[int], groups_per_step: int, seed: int | None, num_steps: int
    ) -> None:
        self.parts = list(parts)
        self.groups_per_step = groups_per_step
        self.seed = seed
        self.num_groups = groups_per_step * num_steps
        self._schedule = ShareSchedule(rates, groups_per_step)
        self._step: tuple[int, list[dict[str, Any]]] = (-1, [])

    def step(self, number: int) -> list[dict[str, Any]]:
        """Return the groups of a step, each with `source`, the number of the stream that it is of."""
        if self._step[0] != number:
            self._schedule = self._schedule.at(number)
            starts, counts = list(self._schedule.taken), self._schedule.at(number).next_step()
            groups = [
                {**group, "source": source}
                for source, (part, start, count) in enumerate(zip(self.parts, starts, counts, strict=True))
                for group in (part.groups(start, count) if count else [])
            ]
            self._step = (number, self._shuffled(groups, number))
        return self._step[1]

    def _shuffled(self, groups: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        if self.seed is None or len(self.parts) == 1:
            return groups
        random = np.random.Generator(np.random.Philox(key=[self.seed, 0], counter=[0, 0, 0, step]))
        return [groups[place] for place in random.permutation(len(groups))]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a single group by its number in the run."""
        step, place = divmod(number, self.groups_per_step)
        return self.step(step)[place]

    def summary(self) -> list[str]:
        """Return a line per stream: the rows read so far, and why some of them could not be used."""
        return [part.summary() for part in self.parts]

    def close(self) -> None:
        """End what encodes ahead."""
        for part in self.parts:
            part.close()


class StreamSteps(Dataset[list[list[dict[str, Any]]]]):
    """This rank's share of an optimizer step, as `StepDataset` returns it: looked up by the numbers of its groups.

    Args:
        stream: the groups of each step.
        split: how a step is cut up.
        rank: whose share.
    """

    def __init__(self, stream: StepStream, split: StreamSplit, rank: int) -> None:
        self.stream = stream
        self.split = split
        self.rank = rank

    def __len__(self) -> int:
        return self.stream.num_groups

    def __getitem__(self, numbers: IntArray) -> list[list[dict[str, Any]]]:
        first = int(numbers[0])
        groups = self.stream.step(first // self.stream.groups_per_step)
        return [
            [{**groups[ref.row], "index": first + ref.row, "counted": ref.counted} for ref in refs]
            for refs in self.split.of(groups)(np.arange(len(groups)), self.rank)
        ]
