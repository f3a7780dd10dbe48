"""Join encoded sources, hold out evaluation groups and apply limits.

Works on arrays of lengths and hashes alone, so that trying another seed or size reads no text again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from rm_scale.data.cache import EncodedSource
from rm_scale.data.chunk_files import GroupArrays
from rm_scale.data.data_report import (
    IntArray,
    TextStatistics,
    text_statistics,
    too_many_text,
)
from rm_scale.errors import DataError
from rm_scale.logs import get_logger

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)


@dataclass(frozen=True)
class GroupSizes:
    """Sizes of all groups of a data set, as arrays `(num_groups,)`.

    Attributes:
        num_tokens: tokens of all K sequences, the prompt counted in each.
        prompt_length: leading tokens that the K sequences share.
        num_responses: K, the number of responses.
    """

    num_tokens: IntArray
    prompt_length: IntArray
    num_responses: IntArray


@dataclass(frozen=True)
class Origins:
    """Where the groups of a data set come from, as arrays `(num_groups,)` in their order.

    Attributes:
        names: names of the sources.
        source: index of the group's source in `names`.
        prompt: hash of the prompt (and tools), the same for all groups of one prompt.
        content: hash of prompt and responses. Both hashes depend on the text alone, not on the tokenizer.
    """

    names: tuple[str, ...]
    source: IntArray
    prompt: IntArray
    content: IntArray


@dataclass(frozen=True)
class GroupSet:
    """Training or evaluation data: a data set of G groups, with what splitting and statistics need as arrays.

    The arrays of a single source that is used whole are files of the cache, mapped into memory.

    Attributes:
        dataset: the groups.
        prompt_lengths: (G,) shared leading tokens.
        num_tokens: (G,) tokens of all sequences of a group.
        lengths: (R,) tokens per sequence, group after group; R is the number of responses of all groups.
        ranks: (R,) ranks in the same order.
        sizes: (G,) responses per group.
        prompts, groups: (G,) hashes of the prompt, and of prompt and responses.
        plain_prompts: (G,) hashes of the normalised prompt.
        sources: (G,) indexes into `source_names`.
        source_names: names of the sources.
    """

    dataset: Dataset
    prompt_lengths: IntArray
    num_tokens: IntArray
    lengths: IntArray
    ranks: IntArray
    sizes: IntArray
    prompts: IntArray
    groups: IntArray
    plain_prompts: IntArray
    sources: IntArray
    source_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, indices: IntArray) -> GroupSet:
        """Return only the groups at these indices, in this order."""
        sizes = self.sizes[indices]
        flat = self._responses_of(indices, sizes)
        return GroupSet(
            self.dataset.select(indices),
            self.prompt_lengths[indices],
            self.num_tokens[indices],
            self.lengths[flat],
            self.ranks[flat],
            sizes,
            self.prompts[indices],
            self.groups[indices],
            self.plain_prompts[indices],
            self.sources[indices],
            self.source_names,
        )

    def _responses_of(self, indices: IntArray, sizes: IntArray) -> IntArray:
        """Return where the responses of the groups at these indices lie, in their order."""
        starts = (np.cumsum(self.sizes) - self.sizes)[indices]
        ends = np.cumsum(sizes)
        # In place, and of half the bytes where they will do: of ten million groups each array is 160 MB.
        flat = np.arange(ends[-1] if len(ends) else 0, dtype=_smallest_type(len(self.lengths)))
        flat += np.repeat((starts - ends + sizes).astype(flat.dtype), sizes)
        return flat

    def limit(self, count: int | None) -> GroupSet:
        """Return only the first `count` groups; all of them for `None`."""
        return self if count is None or count >= len(self) else self.take(np.arange(count))

    def group_sizes(self) -> GroupSizes:
        """Return the sizes of the groups, for packing."""
        return GroupSizes(self.num_tokens, self.prompt_lengths, self.sizes)

    def origins(self) -> Origins:
        """Return where the groups come from."""
        return Origins(self.source_names, self.sources, self.prompts, self.groups)

    def statistics(self) -> TextStatistics:
        """Return lengths, counts and duplicates."""
        return text_statistics(self.prompt_lengths, self.lengths, self.ranks, self.sizes, self.prompts, self.groups)


def join_sources(parts: Sequence[EncodedSource]) -> GroupSet:
    """Concatenate encoded sources, in order.

    Raises:
        DataError: no source has a usable row.
    """
    import datasets

    used = [part for part in parts if len(part.used)]
    if not used:
        reports = [part.report for part in parts]
        read, lost = sum(r.rows_read for r in reports), sum(r.rows_rejected for r in reports)
        files = [part.rejected_path for part in parts if part.report.rows_rejected]
        raise DataError("no usable row is left. " + too_many_text(reports, read, lost, 0.0, files))
    data = datasets.concatenate_datasets([part.used for part in used]) if len(used) > 1 else used[0].used
    arrays = {name: _joined([getattr(part.arrays, name) for part in used]) for name in _ARRAYS}
    return GroupSet(
        data,
        prompt_lengths=arrays["prompt_length"],
        num_tokens=arrays["num_tokens"],
        lengths=arrays["lengths"],
        ranks=arrays["ranks"],
        sizes=arrays["sizes"],
        prompts=arrays["prompt_key"],
        groups=arrays["group_key"],
        plain_prompts=arrays["plain_prompt_key"],
        sources=_source_numbers([len(part.used) for part in parts]),
        source_names=tuple(part.report.name for part in parts),
    )


_ARRAYS = tuple(field.name for field in fields(GroupArrays))


def _joined(arrays: Sequence[IntArray]) -> IntArray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _source_numbers(counts: Sequence[int]) -> IntArray:
    """Return the index of each group's source; of a single source all groups share one number in memory."""
    filled = [number for number, count in enumerate(counts) if count]
    if len(filled) == 1:
        return np.broadcast_to(np.int32(filled[0]), (counts[filled[0]],))
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _smallest_type(count: int) -> type[np.integer[Any]]:
    return np.int32 if count < 2**31 else np.int64


def hold_out(data: GroupSet, size: float, seed: int) -> tuple[GroupSet, GroupSet]:
    """Split off evaluation groups; groups of one prompt stay on one side.

    The result depends on the seed and the prompts alone, not on the number of processes or the order of files.

    Args:
        data: the training data.
        size: `eval_split_size`: a number of groups (>= 1) or a share (< 1).
        seed: seed of the draw.

    Returns:
        What is left to train on, and what is held out.

    Raises:
        DataError: one side would be empty.
    """
    wanted = num_held_out(len(data), size, "eval_dataset_path")
    _, prompt_of, sizes = np.unique(data.prompts, return_inverse=True, return_counts=True)
    held = draw_prompts(sizes, wanted, seed)[prompt_of.reshape(-1)]
    if not held.any():
        raise DataError(
            f"eval_split_size={size:g}: every prompt has more than {wanted} groups, and groups of one prompt stay "
            "together. Fix: choose a larger size, or give eval_dataset_path."
        )
    if held.sum() != wanted:
        logger.warning(f"eval_split_size={size:g}: {held.sum()} groups held out, as groups of one prompt stay together")
    return data.take(np.flatnonzero(~held)), data.take(np.flatnonzero(held))


def num_held_out(num_groups: int, size: float, instead: str) -> int:
    """Return how many groups `eval_split_size` holds out.

    Args:
        num_groups: usable groups.
        size: a number of groups (>= 1) or a share (< 1).
        instead: the setting that names evaluation data of its own, for the message.

    Raises:
        DataError: one side would be empty.
    """
    wanted = int(size) if size >= 1 else round(size * num_groups)
    if not 1 <= wanted < num_groups:
        raise DataError(
            f"eval_split_size={size:g}: holds out {wanted} of {num_groups} usable groups; at least one must be on each "
            f"side. Fix: choose another size, or give {instead}."
        )
    return wanted


def draw_prompts(sizes: IntArray, wanted: int, seed: int | tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return a mask of the prompts to take: in random order, each whose groups still fit in what is wanted."""
    taken = np.zeros(len(sizes), dtype=bool)
    left = wanted
    for prompt in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[prompt] <= left:
            taken[prompt] = True
            left -= int(sizes[prompt])
        if not left:
            break
    return taken
