"""The packed row: groups of responses one after the other, each shared prompt once, no padding in between.

A row holds `prompt | response 1 | ... | response K` of one or many groups. A response sees its prompt and itself; its
positions go on where the prompt ends, as if it stood alone behind it. Without sharing every response is a group of
its own with an empty prompt, so both layouts are one mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

IndexName = tuple[str, int | None]
"""A kind of index arrays (see `rm_scale.batching.packed.index_arrays`) and the window they are for."""


@dataclass(frozen=True)
class GroupSpan:
    """Where one group lies in a row.

    Attributes:
        start: index of its first token.
        prompt_length: tokens that all its responses share and that stand once; may be 0.
        response_lengths: own tokens of each response, each at least 1.
    """

    start: int
    prompt_length: int
    response_lengths: tuple[int, ...]

    @property
    def end(self) -> int:
        """Index behind its last token."""
        return self.start + self.prompt_length + sum(self.response_lengths)

    def responses(self) -> list[tuple[int, int]]:
        """Return the first index, and the index behind the last, of each response's own tokens."""
        spans, start = [], self.start + self.prompt_length
        for length in self.response_lengths:
            spans.append((start, start + length))
            start += length
        return spans


@dataclass(frozen=True)
class _Place:
    """Where an array lies in the tensor that holds them all."""

    start: int
    shape: tuple[int, ...]

    def of(self, values: torch.Tensor) -> torch.Tensor:
        # A copy, since compilers make the place of a view in its memory an input of what they compile.
        return values[self.start : self.start + math.prod(self.shape)].view(self.shape).clone()


@dataclass(frozen=True)
class IndexTable:
    """Index arrays of a row by name, all in one tensor: they reach another process, or a GPU, by one copy.

    Attributes:
        values: `(total,)` int32, wherever the row is.
        entries: for each name its dataclass and that dataclass's fields: first element and shape of an array in
            `values`, or a plain value.
    """

    values: torch.Tensor
    entries: Mapping[IndexName, tuple[type[Any], tuple[_Place | int | None, ...]]]

    @classmethod
    def of(cls, arrays: Mapping[IndexName, Any]) -> IndexTable:
        """Make the table of dataclasses whose fields are int32 tensors on the CPU, numbers or `None`."""
        parts: list[torch.Tensor] = []
        entries: dict[IndexName, tuple[type[Any], tuple[_Place | int | None, ...]]] = {}
        total = 0
        for name, item in arrays.items():
            places: list[_Place | int | None] = []
            for value in (getattr(item, one.name) for one in fields(item)):
                if not isinstance(value, torch.Tensor):
                    places.append(value)
                    continue
                assert value.dtype == torch.int32, "one tensor has one type"
                parts.append(value.flatten())
                places.append(_Place(total, tuple(value.shape)))
                total += value.numel()
            entries[name] = (type(item), tuple(places))
        return cls(torch.cat(parts), entries)

    def __contains__(self, name: IndexName) -> bool:
        return name in self.entries

    def __getitem__(self, name: IndexName) -> Any:
        """Return the dataclass of this name, its tensors on the device of `values`."""
        kind, places = self.entries[name]
        return kind(*[place.of(self.values) if isinstance(place, _Place) else place for place in places])


@dataclass(frozen=True)
class RowLayout:
    """What attention must know of a row.

    Attributes:
        spans: the groups, in the order of their tokens, without gaps.
        width: tokens of the row, padding at its end included.
        index: index arrays made beforehand (`rm_scale.batching.packed.index_arrays.prepare_index`); they travel with
            the row. What is not there the first layer that needs it makes.
        derived: what backends keep of the row between layers, by name; it stays where it was made.
    """

    spans: tuple[GroupSpan, ...]
    width: int
    index: IndexTable | None = field(default=None, compare=False, repr=False)
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.spans[-1].end if self.spans else 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RowLayout:
        """Return the row with its prepared index arrays on `device`: one copy, from pinned memory without a wait.

        Args:
            device: where the model is.
            non_blocking: as for `torch.Tensor.to`.
        """
        if self.index is None:
            return self
        values = self.index.values.to(device, non_blocking=non_blocking)
        return self if values is self.index.values else self._with_index(values)

    def pin_memory(self) -> RowLayout:
        """Return the row with its prepared index arrays in page-locked memory. `DataLoader` calls this by its name."""
        return self if self.index is None else self._with_index(self.index.values.pin_memory())

    def _with_index(self, values: torch.Tensor) -> RowLayout:
        assert self.index is not None
        return RowLayout(self.spans, self.width, IndexTable(values, self.index.entries))

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes with what was prepared, without what was derived."""
        return (RowLayout, (self.spans, self.width, self.index))


@dataclass(frozen=True)
class PackedRow:
    """Tensors of a row with N responses.

    Attributes:
        input_ids, position_ids: `(1, width)`.
        score_index: `(N,)` index of each response's last token, in the order of groups and responses.
        layout: where groups lie.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    score_index: torch.Tensor
    layout: RowLayout


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all sequences share, leaving each at least one of its own."""
    longest = min(len(sequence) for sequence in sequences) - 1
    first = sequences[0]
    for index in range(longest):
        token = first[index]
        if any(sequence[index] != token for sequence in sequences[1:]):
            return index
    return max(0, longest)


def packed_length(num_tokens: Any, prompt_length: Any, num_responses: Any) -> Any:
    """Return the tokens of a group whose prompt stands once. Works on numbers and on arrays of them.

    Args:
        num_tokens: tokens of all its sequences, the prompt counted in each.
        prompt_length: tokens they share.
        num_responses: how many sequences.
    """
    return num_tokens - (num_responses - 1) * prompt_length


def round_up(number: int, multiple: int) -> int:
    """Return the next multiple of `multiple` from `number` on."""
    return -(-number // multiple) * multiple


def pack_row(
    groups: Sequence[Sequence[Sequence[int]]], share_prompts: bool, pad_token_id: int, multiple: int = 1
) -> PackedRow:
    """Lay groups out in one row.

    Args:
        groups: for each group its K token sequences, prompt included in each; none empty.
        share_prompts: let the longest common token prefix of a group stand once.
        pad_token_id: what fills the row's end.
        multiple: the width is rounded up to a multiple of this, so that kernels meet fewer shapes.
    """
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    spans: list[GroupSpan] = []
    for sequences in groups:
        shared = common_prefix_length(sequences) if share_prompts and len(sequences) > 1 else 0
        for members in [sequences] if shared else [[sequence] for sequence in sequences]:
            spans.append(GroupSpan(len(tokens), shared, tuple(len(sequence) - shared for sequence in members)))
            tokens += members[0][:shared]
            positions += range(shared)
            for sequence in members:
                tokens += sequence[shared:]
                positions += range(shared, len(sequence))
                ends.append(len(tokens) - 1)
    width = round_up(len(tokens), multiple)
    padding = width - len(tokens)
    return PackedRow(
        input_ids=torch.tensor([tokens + [pad_token_id] * padding], dtype=torch.long),
        position_ids=torch.tensor([positions + [0] * padding], dtype=torch.long),
        score_index=torch.tensor(ends, dtype=torch.long),
        layout=RowLayout(tuple(spans), width),
    )
