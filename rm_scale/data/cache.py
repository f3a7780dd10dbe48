"""Cache each source's encoded rows on disk, so that a later run with the same data settings reads nothing twice.

A source is encoded in chunks, each published when it is complete, so that a killed run goes on where it was and several
processes share the work (`rm_scale.data.shared_work`). An entry counts from the moment its `meta.json` is there. It is
found by a hash of everything that decides its content (`encoding_hash`).
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.config import RunConfig
from rm_scale.config_columns import preset_entries
from rm_scale.data.chunk_files import (
    GroupArrays,
    RowCounts,
    join_chunks,
    open_arrays,
    open_table,
    rejected_file,
    remove_parts,
    write_chunk,
)
from rm_scale.data.data_report import SourceReport
from rm_scale.data.encoded_rows import encode_batch, read_row, row_features
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.format_detection import FormatVerdict, warn_about_hard_labels
from rm_scale.data.formats import RowReader
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.rejected_rows import FILTERED
from rm_scale.data.row_chunks import Chunk, ChunkedRows, open_rows
from rm_scale.data.row_readers import choose_reader
from rm_scale.data.shared_work import ChunkWork, chunk_folder, make_all, remove_locks
from rm_scale.data.sources import Source
from rm_scale.distributed import detect_world
from rm_scale.errors import DataError, ModelError
from rm_scale.files import write_whole
from rm_scale.logs import get_logger
from rm_scale.texts import some_names

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

# Part of the cache key. Raise it when a change to reading, formats or encoding gives other results from the same file.
CODE_VERSION = 7
DEFAULT_CACHE_DIR = "~/.cache/rm_scale"
# System errors that mean "this cache folder can't be used"; any other error is not the cache's fault.
_CACHE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR),  # it, or a folder that it lies in, is a file
)
_SAMPLE_CHARACTERS = 20_000
# Fewer are encoded before a worker process could have begun.
_FEW_ROWS = 4_000
_LAYOUT, _RAW = "layout.json", "raw"
_ENTRY = re.compile(r"raw|locks|chunk-.*|.*\.npy|rejected\.jsonl|\.?(layout|meta)\.json.*")


class RejectedRows:
    """The rejected rows of several sources, read from disk again on each iteration.

    Args:
        parts: per source its `rejected.jsonl`, its name and its number of rejected rows.
    """

    def __init__(self, parts: Sequence[tuple[Path, str, int]]) -> None:
        self._parts = list(parts)

    def __len__(self) -> int:
        return sum(count for _, _, count in self._parts)

    def files(self) -> list[Path]:
        """Return the files that hold them, a JSON line per row."""
        return [path for path, _, count in self._parts if count]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path, source, _ in self._parts:
            with path.open(encoding="utf-8") as stream:
                for line in stream:
                    yield {"source": source, **json.loads(line)}


@dataclass(frozen=True)
class EncodedSource:
    """One encoded source, as the cache holds it.

    Attributes:
        used: its usable rows, with the columns of `encoded_rows.row_features`.
        report: what became of its rows.
        rejected_path: JSONL file of its rejected rows.
        arrays: of its usable rows, what splitting and statistics need.
    """

    used: Dataset
    report: SourceReport
    rejected_path: Path
    arrays: GroupArrays


def encoding_hash(sources: Sequence[Source], encoder: TextEncoder) -> str:
    """Return the hash of everything that decides the encoded rows of sources."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "datasets")}
    facts = {
        "code": CODE_VERSION,
        "versions": versions,
        "sources": [(source.identity, asdict(source.reading)) for source in sources],
        "presets": preset_entries(),  # one may be used unasked, by the columns
        "encoder": encoder.describe(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load_or_encode(source: Source, split: str, config: RunConfig, encoder: TextEncoder) -> EncodedSource:
    """Return a source's encoded rows from the cache; read, check and encode it first where the cache has none.

    Args:
        source: what to read.
        split: what it is read for, "train" or "eval"; only reported.
        config: format, subset column, cache folder and number of processes.
        encoder: how text becomes tokens.

    Raises:
        DataError: the source can't be read, fits no format, or the cache folder can't be written.
        ModelError: conversations without a chat template.
    """
    root = Path(config.dataset_cache_dir or DEFAULT_CACHE_DIR).expanduser()
    key = encoding_hash([source], encoder)
    folder = root / f"encoded-{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not _is_complete(folder):
            _build(folder, source, config, encoder)
    except OSError as error:
        at = root if error.filename is None else Path(os.fsdecode(error.filename))
        if error.errno not in _CACHE_ERRORS or not (at.is_relative_to(root) or root.is_relative_to(at)):
            raise  # not the cache's fault: a data file that may not be read, say
        raise DataError(
            f"dataset_cache_dir={root}: can't be written ({error}). Fix: --dataset_cache_dir DIR, one with room."
        ) from error
    return _load(folder, source.name, split)


def _lock(path: Path, name: str) -> Any:
    """Take the lock of one cache entry, logging a line for each minute that another process holds it.

    The operating system frees the lock when its holder dies.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    while True:
        try:
            return lock.acquire(timeout=60)
        except Timeout:
            logger.info(f"{name}: waiting for another process that is encoding it (lock {path})")


def _is_complete(folder: Path) -> bool:
    return (folder / "meta.json").is_file()


def _build(folder: Path, source: Source, config: RunConfig, encoder: TextEncoder) -> None:
    """Encode one source into `folder`, together with other processes that do the same; return when it is complete."""
    lock = folder.with_name(f"{folder.name}.lock")
    with _lock(lock, source.name):
        if _is_complete(folder):
            return
        begun = _begin(folder, source, encoder)
    schema = row_features().arrow_schema

    def make(number: int, aside: Path) -> None:
        chunk = begun.chunks[number]
        write_chunk(aside, (encode_batch(rows, begun.reader, encoder, schema) for rows in begun.rows.batches(chunk)))
        _require_unchanged(source)

    work = ChunkWork(folder, source.name, len(begun.chunks), make, lambda: _is_complete(folder))
    try:
        make_all(work, _num_processes(config, begun.chunks))
    except FileNotFoundError:
        if not _is_complete(folder):  # what another process has finished and cleared is no loss
            raise
    with _lock(lock, source.name):
        if not _is_complete(folder):
            counts = join_chunks(folder, _chunk_folders(folder, len(begun.chunks)))
            _write_meta(folder, begun, counts)
            _clear(folder, len(begun.chunks))


@dataclass(frozen=True)
class _Begun:
    """A source of which all is known that encoding it needs.

    Attributes:
        rows: its rows.
        chunks: the parts that they are encoded in.
        reader: turns one row into a group.
        verdict: why so.
    """

    rows: ChunkedRows
    chunks: list[Chunk]
    reader: RowReader
    verdict: FormatVerdict


def _begin(folder: Path, source: Source, encoder: TextEncoder) -> _Begun:
    """Open a source and see how it is read and cut, or go on with what an earlier call has left in `folder`.

    Raises:
        DataError: it can't be read, or fits no format.
        ModelError: conversations without a chat template.
    """
    layout = folder / _LAYOUT
    goes_on = layout.is_file()
    if not goes_on:
        _require_own(folder)
        shutil.rmtree(folder, ignore_errors=True)
    work = folder / _RAW
    work.mkdir(parents=True, exist_ok=True)
    try:
        rows = open_rows(source, work)
        sample = rows.sample()
        reader, verdict = choose_reader(source, rows, sample)
        warn_about_template(sample, reader, encoder)
        if goes_on:
            chunks = [Chunk(*values) for values in json.loads(layout.read_text(encoding="utf-8"))["chunks"]]
        else:
            chunks = rows.cut()
            _require_unchanged(source)
            write_whole(layout, json.dumps({"chunks": chunks}))
    except BaseException:
        if not goes_on:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return _Begun(rows, chunks, reader, verdict)


def _require_own(folder: Path) -> None:
    """Refuse to clear a cache entry that holds anything we did not write.

    Raises:
        DataError: names the first of it.
    """
    foreign = sorted(path.name for path in folder.glob("*") if not _ENTRY.fullmatch(path.name))
    if foreign:
        raise DataError(
            f"{folder}: is a damaged cache entry (without meta.json), and {foreign[0]} in it is not ours; nothing is "
            "removed. Fix: move it away, or another --dataset_cache_dir."
        )


def _require_unchanged(source: Source) -> None:
    """Refuse a source of which another process has changed the files meanwhile.

    Raises:
        DataError: size or time of one differs from what they were.
    """
    if source.look_again is None:
        return
    try:
        now = source.look_again()
    except FileNotFoundError:
        now = {}
    if now != source.identity:
        raise DataError(
            f"{source.name}: has changed while it was read (size or time of its files). Fix: start again when what "
            "writes it has ended; nothing of it is used."
        )


def _num_processes(config: RunConfig, chunks: Sequence[Chunk]) -> int:
    """Return how many processes this one encodes with: its share of the machine's cores, or 1 for few rows."""
    if sum(chunk.num_rows for chunk in chunks) < _FEW_ROWS:
        return 1
    share = len(os.sched_getaffinity(0)) // detect_world().ranks_on_node
    return config.dataset_num_proc or max(1, share)


def _chunk_folders(folder: Path, count: int) -> list[Path]:
    return [chunk_folder(folder, number) for number in range(count)]


def _clear(folder: Path, num_chunks: int) -> None:
    """Remove from a complete entry what only the work on it needed."""
    shutil.rmtree(folder / _RAW, ignore_errors=True)
    remove_locks(folder)
    remove_parts(_chunk_folders(folder, num_chunks))


def warn_about_template(sample: Sequence[Any], reader: RowReader, encoder: TextEncoder) -> None:
    """Warn, from the first usable row, about a chat template whose scores would differ between days or programs.

    Raises:
        ModelError: the row is a conversation and there is no chat template.
    """
    read = [read_row(reader, row, index) for index, row in enumerate(sample)]
    groups = [group for group in read if isinstance(group, PreferenceGroup)]
    # Of megabytes, which may be refused as too long anyway, nothing more would be learnt.
    if not groups:
        return
    group = next((group for group in groups if _size(group) <= _SAMPLE_CHARACTERS), min(groups, key=_size))
    if group.is_conversational and "strftime_now" in (encoder.chat_template or ""):
        logger.warning(
            "The chat template writes today's date, so the same text will get another score on another day. "
            "Fix: --chat_template_path with a fixed date."
        )
    try:
        encoder.encode(group.prompt, group.responses[0], group.tools)  # raises ModelError without a chat template
    except DataError:
        return  # the row will be counted as rejected, with its reason
    try:
        encoder.render(group.prompt, group.responses[0], group.tools)
    except ModelError as error:
        logger.warning(str(error))


def _size(group: PreferenceGroup) -> int:
    return len(str(group.prompt)) + len(str(group.responses[0]))


def _write_meta(folder: Path, begun: _Begun, counts: RowCounts) -> None:
    meta = {
        "format": begun.verdict.name,
        "format_reason": begun.verdict.why,
        "ignored_columns": list(begun.verdict.ignored_columns),
        "num_chunks": len(begun.chunks),
        "counts": counts.to_json(),
    }
    write_whole(folder / "meta.json", json.dumps(meta, indent=2))


def _load(folder: Path, name: str, split: str) -> EncodedSource:
    """Read a complete cache entry and log how its source was read."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    counts = RowCounts.from_json(meta["counts"])
    rows_read = counts.read
    used = open_table(_chunk_folders(folder, meta["num_chunks"]), folder.name)
    ignored = f"; columns not read: {some_names(meta['ignored_columns'])}" if meta["ignored_columns"] else ""
    logger.info(f"{name}: read as {meta['format']}, since {meta['format_reason']}{ignored}")
    if counts.soft_labels and counts.soft_labels == counts.hard_labels:
        warn_about_hard_labels(name)
    filtered = counts.rejected.pop(FILTERED, None)
    report = SourceReport(
        name=name,
        split=split,
        format=meta["format"],
        format_reason=meta["format_reason"],
        rows_read=rows_read,
        rows_used=counts.used,
        rejected=counts.rejected,
        rows_filtered=filtered.count if filtered is not None else 0,
        ignored_columns=tuple(meta["ignored_columns"]),
    )
    assert report.rows_read == report.rows_used + report.rows_rejected + report.rows_filtered, report
    assert len(used) == counts.used, folder
    return EncodedSource(used, report, rejected_file(folder), open_arrays(folder, counts.used))
