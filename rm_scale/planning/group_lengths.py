"""How long the groups of a data set are, and what a micro-step of them costs in each layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rm_scale.planning.scenario import RowLoad

ROW_FILL = 0.95
"""Share of the token budget that packed rows use when there are many groups to choose from."""


@dataclass(frozen=True)
class GroupLengths:
    """Tokens of one group: its shared prompt and what follows it in each response."""

    prompt: int
    responses: tuple[int, ...]

    def tokens(self, packing: str) -> int:
        """Count its tokens in a packed row."""
        if packing == "prefix_shared":
            return self.prompt + sum(self.responses)
        return len(self.responses) * self.prompt + sum(self.responses)

    def squared(self, packing: str) -> int:
        """Return its cost in attention, see `RowLoad.squared`."""
        if packing == "prefix_shared":
            return self.prompt**2 + sum(r * (2 * self.prompt + r) for r in self.responses)
        return sum((self.prompt + r) ** 2 for r in self.responses)

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return self.prompt + max(self.responses)


@dataclass(frozen=True)
class LengthMix:
    """The lengths a run meets.

    Attributes:
        groups: a sample of groups, in the data set's order.
        origin: where they are from, for people.
        num_groups: groups in the whole data set, `None` when unknown.
    """

    groups: tuple[GroupLengths, ...]
    origin: str
    num_groups: int | None = None

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest response with its prompt."""
        return max(group.longest for group in self.groups)

    def largest_group(self, packing: str) -> int:
        """Count the longest group's tokens in a packed row."""
        return max(group.tokens(packing) for group in self.groups)

    def mean_tokens(self, packing: str) -> float:
        """Return the mean tokens of a group in a packed row."""
        return sum(group.tokens(packing) for group in self.groups) / len(self.groups)

    def spread_of_tokens(self, packing: str) -> float:
        """Return the standard deviation of a group's tokens in a packed row."""
        mean = self.mean_tokens(packing)
        return math.sqrt(sum((group.tokens(packing) - mean) ** 2 for group in self.groups) / len(self.groups))

    def cut(self, max_length: int) -> LengthMix:
        """Leave out the groups that have a sequence over `max_length`, as a run does."""
        kept = tuple(group for group in self.groups if group.longest <= max_length)
        share = len(kept) / len(self.groups)
        number = None if self.num_groups is None else round(self.num_groups * share)
        return LengthMix(kept, self.origin, number)

    def packed_load(self, packing: str, max_tokens: int) -> RowLoad:
        """Return a device's mean micro-step, in packed rows of up to `max_tokens`."""
        fill = max(self.mean_tokens(packing), min(max_tokens * ROW_FILL, max_tokens - self.mean_tokens(packing) / 4))
        return self._load(packing, fill / self.mean_tokens(packing))

    def padded_load(self, micro_batch: int) -> RowLoad:
        """Return the mean micro-step of `micro_batch` groups, padded to their longest sequence."""
        batches = list(_batches(self.groups, micro_batch))
        tokens = squared = 0.0
        for batch in batches:
            length = max(group.longest for group in batch)
            responses = sum(len(group.responses) for group in batch) * micro_batch / len(batch)
            tokens += responses * length / len(batches)
            squared += responses * length**2 / len(batches)
        load = self._load("padding_free", micro_batch)
        return RowLoad(tokens, squared, load.effective_tokens, load.effective_squared, load.groups, load.responses)

    def _load(self, packing: str, groups: float) -> RowLoad:
        share = groups / len(self.groups)
        return RowLoad(
            tokens=share * sum(group.tokens(packing) for group in self.groups),
            squared=share * sum(group.squared(packing) for group in self.groups),
            effective_tokens=share * sum(group.tokens("padding_free") for group in self.groups),
            effective_squared=share * sum(group.squared("padding_free") for group in self.groups),
            groups=groups,
            responses=share * sum(len(group.responses) for group in self.groups),
        )


def _batches(groups: Sequence[GroupLengths], size: int) -> list[Sequence[GroupLengths]]:
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def full_rows(max_length: int, prompt_share: float = 0.5) -> LengthMix:
    """Assume that every sequence is as long as it may be, as a plan does that knows nothing about the data."""
    prompt = int(max_length * prompt_share)
    group = GroupLengths(prompt, (max_length - prompt, max_length - prompt))
    return LengthMix((group,), f"assumed: every sequence {max_length:,} tokens, half of them the shared prompt")
