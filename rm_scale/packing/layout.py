"""The packed row: groups of responses one after the other, each shared prompt once, no padding in between.

A row holds `prompt | response 1 | ... | response K` of one or many groups. A response sees its prompt and itself; its
positions go on where the prompt ends, as if it stood alone behind it. Without sharing every response is a group of
its own with an empty prompt, so both layouts are one mechanism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


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
        """First index and the index behind the last of each response's own tokens."""
        spans, start = [], self.start + self.prompt_length
        for length in self.response_lengths:
            spans.append((start, start + length))
            start += length
        return spans


@dataclass(frozen=True)
class RowLayout:
    """What attention must know of a row. Index arrays are derived once per row and kept in `derived`.

    Attributes:
        spans: the groups, in the order of their tokens, without gaps.
        width: tokens of the row, padding at its end included.
        derived: what backends computed from it, by name; filled by the first layer that needs it.
    """

    spans: tuple[GroupSpan, ...]
    width: int
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.spans[-1].end if self.spans else 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes without what was derived."""
        return (RowLayout, (self.spans, self.width))


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
    """How many leading tokens all sequences share, leaving each at least one of its own."""
    longest = min(len(sequence) for sequence in sequences) - 1
    first = sequences[0]
    for index in range(longest):
        token = first[index]
        if any(sequence[index] != token for sequence in sequences[1:]):
            return index
    return max(0, longest)


def packed_length(num_tokens: Any, prompt_length: Any, num_responses: Any) -> Any:
    """Tokens of a group whose prompt stands once. Works on numbers and on arrays of them.

    Args:
        num_tokens: tokens of all its sequences, the prompt counted in each.
        prompt_length: tokens they share.
        num_responses: how many sequences.
    """
    return num_tokens - (num_responses - 1) * prompt_length


def round_up(number: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
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
