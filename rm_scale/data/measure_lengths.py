"""Measure how long the groups of a preference file are, without torch: what `rm-scale plan --data` does."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rm_scale.data.conversations import message_text
from rm_scale.data.preference_group import PreferenceGroup, Text
from rm_scale.data.reading import Reading
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_readers import choose_reader, open_source
from rm_scale.data.sources import RawRows, Source, local_sources
from rm_scale.errors import DataError
from rm_scale.planning.group_lengths import GroupLengths, LengthMix

SAMPLE = 2000
"""Groups that are measured; more would not change a plan."""

CHARACTERS_PER_TOKEN = 4.2
"""Of English text with vocabularies of 32,000 to 152,000 tokens; used when there is no tokenizer.json at hand."""

TOKENS_PER_MESSAGE = 4
"""Role and separators that a chat template adds to each message."""


def measure_lengths(paths: Sequence[str], model: str | None, reading: Reading | None = None) -> LengthMix:
    """Token lengths of a sample of the files' groups.

    Args:
        paths: preference files or patterns.
        model: folder with a tokenizer.json; without one lengths are estimated from characters.
        reading: how their rows are read; `None` for what the columns show.

    Raises:
        DataError: the file can't be read, or holds no group.
    """
    count, how = _counter(model)
    groups: list[GroupLengths] = []
    total = 0
    for found in local_sources(paths):
        source = dataclasses.replace(found, reading=reading or found.reading)
        with tempfile.TemporaryDirectory() as work:
            rows = open_source(source, Path(work))
            total += len(rows.dataset)
            groups += _measure(rows, source, count, SAMPLE - len(groups))
    if not groups:
        names = " ".join(paths)
        raise DataError(f"data={names}: none of its rows could be read. Fix: rm-scale data --dataset_path {names}.")
    return LengthMix(tuple(groups), f"{len(groups):,} of {total:,} groups of {', '.join(paths)}, {how}", total)


def _measure(rows: RawRows, source: Source, count: Callable[[str], int], wanted: int) -> list[GroupLengths]:
    step = max(1, len(rows.dataset) // max(1, wanted))
    indices = list(range(0, len(rows.dataset), step))[:wanted]
    decoded = [row for _, row in rows.decode(rows.dataset[indices], indices)]
    sample = [row for row in decoded if isinstance(row, Mapping)]
    if not sample:
        return []
    reader, _ = choose_reader(source, rows, sample, checks_context=False)
    measured = []
    for index, row in zip(indices, decoded, strict=True):
        with contextlib.suppress(RejectedRow):  # `rm-scale data` counts these
            measured.append(_lengths(reader.read(row, index), count))
    return measured


def _lengths(group: PreferenceGroup, count: Callable[[str], int]) -> GroupLengths:
    responses = tuple(max(1, _tokens(response, count)) for response in group.responses)
    return GroupLengths(_tokens(group.prompt, count), responses)


def _tokens(text: Text, count: Callable[[str], int]) -> int:
    if isinstance(text, str):
        return count(text)
    return sum(count(message_text(message)) + TOKENS_PER_MESSAGE for message in text)


def _counter(model: str | None) -> tuple[Callable[[str], int], str]:
    file = Path(model) / "tokenizer.json" if model else None
    if file is None or not file.is_file():
        return (
            lambda text: round(len(text) / CHARACTERS_PER_TOKEN),
            f"estimated at {CHARACTERS_PER_TOKEN} characters per token",
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), f"with {file}"
