"""The sources of a streamed run: how each is read, found out from its first rows, and those rows encoded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.config import RunConfig
from rm_scale.config_sources import sources_in
from rm_scale.data.cache import EncodedSource, encoding_hash, warn_about_template
from rm_scale.data.chunk_files import GroupArrays, counts_of
from rm_scale.data.data_report import SourceReport
from rm_scale.data.encoded_rows import encode_batch, row_features
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.rejected_rows import FILTERED
from rm_scale.data.row_filters import passes_all
from rm_scale.data.row_readers import choose_reader, is_read_by_rows
from rm_scale.data.sources import Source, columns_of, readable_rows, without_rows
from rm_scale.data.stream import StreamSource
from rm_scale.errors import DataError

if TYPE_CHECKING:
    from rm_scale.data.formats import RowReader

FIRST_ROWS = 256
"""Rows of each source that are read to see what it is, and encoded for statistics, samples and checks."""

_MOST_FIRST_ROWS = 100_000
"""Rows that are looked through for some that a source's filters let pass."""


@dataclass(frozen=True)
class StreamedPart:
    """What is streamed under one name: the files of an entry of `datasets`, or all of a run without such a list.

    Attributes:
        name: of the entry; "" without a list.
        sources: read one after the other.
        identity: hash of what must be unchanged for a record of its blocks to be valid: files, and how they are read.
    """

    name: str
    sources: tuple[StreamSource, ...]
    identity: str


@dataclass(frozen=True)
class StreamedSources:
    """Everything that a streamed run reads.

    Attributes:
        parts: mixed in the shares of the run's mixture, if there are several.
        previews: the first rows of each file, encoded.
    """

    parts: tuple[StreamedPart, ...]
    previews: tuple[EncodedSource, ...]


def open_streams(config: RunConfig, sources: Sequence[Source], encoder: TextEncoder) -> StreamedSources:
    """Look at the first rows of each source, and return how all of them are read.

    Args:
        config: the run's settings.
        sources: files and hub data sets to train on.
        encoder: how text becomes tokens.

    Raises:
        DataError: a source can't be read row by row, fits no format, or has no rows.
        ModelError: conversations without a chat template.
    """
    opened = [_open(source, encoder) for source in sources]
    names = [entry.name for entry in sources_in(config, "datasets")] or [""]
    parts = []
    for name in names:
        own = [(source, stream) for source, (stream, _) in zip(sources, opened, strict=True) if source.member == name]
        identity = encoding_hash([source for source, _ in own], encoder)
        parts.append(StreamedPart(name, tuple(stream for _, stream in own), identity))
    return StreamedSources(tuple(parts), tuple(preview for _, preview in opened))


@dataclass(frozen=True)
class _FirstRows:
    """Rows of which the columns are those seen in a sample."""

    told: str = ""
    preset: str | None = None

    def columns(self, sample: Sequence[Mapping[str, Any]]) -> list[str]:
        return columns_of(sample)


def _open(source: Source, encoder: TextEncoder) -> tuple[StreamSource, EncodedSource]:
    assert source.stream is not None, source.name
    first, sample = _first_rows(source)
    if not is_read_by_rows(source, columns_of(sample)):
        raise DataError(
            f"{source.name}: its map puts rows together, for which all of them must be read first, and streaming reads "
            "each as it comes. Fix: streaming: false for it, or write its groups to a file beforehand."
        )
    reader, verdict = choose_reader(source, _FirstRows(), sample)
    warn_about_template(sample, reader, encoder)
    preview = _preview(source.name, first, reader, encoder, verdict.name, verdict.why, verdict.ignored_columns)
    return StreamSource(source.name, reader, source.stream), preview


def _first_rows(source: Source) -> tuple[list[tuple[int, Any]], list[dict[str, Any]]]:
    """Return the first rows, up to some that the source's filters let pass, and those of them that are readable.

    Raises:
        DataError: it has no rows, or none that is readable.
    """
    assert source.stream is not None
    rows = source.stream(0)
    first: list[tuple[int, Any]] = []
    while more := list(islice(rows, FIRST_ROWS)):
        first += more
        try:
            sample = readable_rows([value for _, value in first])
        except DataError as error:
            raise DataError(f"{source.name}: {error}") from error
        filters = source.reading.filters
        if any(passes_all(row, filters) for row in sample) or len(first) >= _MOST_FIRST_ROWS:
            return first, sample
    if not first:
        raise without_rows(source.name)
    return first, sample


def _preview(
    name: str,
    rows: Sequence[tuple[int, Any]],
    reader: RowReader,
    encoder: TextEncoder,
    format: str,
    why: str,
    ignored: tuple[str, ...],
) -> EncodedSource:
    import datasets
    import pyarrow as pa

    batch = encode_batch(rows, reader, encoder, row_features().arrow_schema)
    counts = counts_of(batch)
    filtered = counts.rejected.pop(FILTERED, None)
    report = SourceReport(
        name=name,
        split="train",
        format=format,
        format_reason=why,
        rows_read=len(rows),
        rows_used=counts.used,
        rejected=counts.rejected,
        rows_filtered=filtered.count if filtered is not None else 0,
        ignored_columns=ignored,
    )
    used = datasets.Dataset(pa.Table.from_batches([batch.used]))
    return EncodedSource(used, report, Path(os.devnull), GroupArrays(**batch.arrays))
