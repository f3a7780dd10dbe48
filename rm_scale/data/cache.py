"""Cache each source's encoded rows on disk, so that a later run with the same data settings reads nothing twice.

A cache entry is written under a temporary name and renamed when complete, so a killed process never leaves half of
one that a later run would use. Entries are found by a hash of everything that decides their content (`cache_key`).
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rm_scale.config import RunConfig
from rm_scale.data.data_report import (
    NUM_FIRST_ROWS,
    RejectionCount,
    SourceReport,
)
from rm_scale.data.encoded_rows import encode_rows, read_row, row_features
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.format_detection import FormatVerdict, warn_about_hard_labels
from rm_scale.data.formats import RowReader
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.row_readers import choose_reader, open_source
from rm_scale.data.sources import Source
from rm_scale.errors import DataError, ModelError
from rm_scale.logs import get_logger
from rm_scale.texts import some_names

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

# Part of the cache key. Raise it when a change to reading, formats or encoding gives other results from the same file.
CODE_VERSION = 5
DEFAULT_CACHE_DIR = "~/.cache/rm_scale"
# System errors that mean "this cache folder can't be used"; any other error is not the cache's fault.
_CACHE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR),  # it, or a folder that it lies in, is a file
)
_SAMPLE_CHARACTERS = 20_000


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
        used: its usable rows, with the columns that only splitting and statistics need (`splits.SPLIT_COLUMNS`).
        report: what became of its rows.
        rejected_path: JSONL file of its rejected rows.
    """

    used: Dataset
    report: SourceReport
    rejected_path: Path


def cache_key(source: Source, config: RunConfig, encoder: TextEncoder) -> str:
    """Return the hash of everything that decides the encoded rows of a source."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "datasets")}
    facts = {
        "code": CODE_VERSION,
        "versions": versions,
        "source": source.identity,
        "reading": asdict(source.reading),
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
    key = cache_key(source, config, encoder)
    folder = root / f"encoded-{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not _is_complete(folder):
            with _lock(root / f"encoded-{key}.lock", source.name):
                _build_if_missing(folder, source, config, encoder)
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


def _build_if_missing(folder: Path, source: Source, config: RunConfig, encoder: TextEncoder) -> None:
    """Write the cache entry `folder`, unless another process did so before this one had the lock."""
    if _is_complete(folder):
        return
    # The lock is held, so whatever of ours lies here incomplete was left by a killed process.
    _require_own(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.parent / f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}"
    aside.mkdir()
    try:
        _build(aside, source, config, encoder)
        try:
            aside.rename(folder)
        except OSError:
            # Some network file systems don't lock across nodes, so another node may have finished the entry first.
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


_ENTRY = {"used", "rejected.jsonl", "meta.json", "work"}


def _require_own(folder: Path) -> None:
    """Refuse to clear a cache entry that holds anything we did not write.

    Raises:
        DataError: names the first of it.
    """
    foreign = sorted(path.name for path in folder.glob("*") if path.name not in _ENTRY)
    if foreign:
        raise DataError(
            f"{folder}: is a damaged cache entry (without meta.json), and {foreign[0]} in it is not ours; nothing is "
            "removed. Fix: move it away, or another --dataset_cache_dir."
        )


def _build(folder: Path, source: Source, config: RunConfig, encoder: TextEncoder) -> None:
    """Encode one source into `folder`: `used/`, `rejected.jsonl` and, last, `meta.json`."""
    work = folder / "work"
    work.mkdir()
    raw = open_source(source, work)
    try:
        sample = raw.sample()
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from error
    reader, verdict = choose_reader(source, raw, sample)
    _warn_about_template(sample, reader, encoder)
    mapped = encode_rows(raw, reader, encoder, config, work)
    reasons = np.asarray(mapped.with_format("arrow").select_columns(["reason"])[:]["reason"].to_numpy())
    good = np.flatnonzero(reasons == "")
    used = mapped.select(good).remove_columns(["reason", "detail"])
    if len(used):
        used.save_to_disk(str(folder / "used"))
    rejected = _write_rejected(mapped.select(np.flatnonzero(reasons != "")), folder / "rejected.jsonl")
    _write_meta(folder, verdict, len(mapped), len(used), rejected)
    del mapped, used, raw
    shutil.rmtree(work)


def _warn_about_template(sample: Sequence[Any], reader: RowReader, encoder: TextEncoder) -> None:
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


def _write_rejected(rows: Dataset, path: Path) -> dict[str, RejectionCount]:
    """Write one JSON line per rejected row; return their counts by reason."""
    counts: dict[str, int] = {}
    first: dict[str, list[int]] = {}
    details: dict[str, str] = {}
    with path.open("w", encoding="utf-8") as stream:
        for row in rows.select_columns(["row", "reason", "detail"]):
            reason = row["reason"]
            counts[reason] = counts.get(reason, 0) + 1
            if counts[reason] <= NUM_FIRST_ROWS:
                first.setdefault(reason, []).append(row["row"])
                details.setdefault(reason, row["detail"])
            stream.write(json.dumps({"row": row["row"], "reason": reason, "detail": row["detail"]}) + "\n")
    return {
        reason: RejectionCount(count, tuple(first[reason]), details[reason]) for reason, count in sorted(counts.items())
    }


def _write_meta(
    folder: Path, verdict: FormatVerdict, rows_read: int, rows_used: int, rejected: Mapping[str, RejectionCount]
) -> None:
    meta = {
        "format": verdict.name,
        "format_reason": verdict.why,
        "ignored_columns": list(verdict.ignored_columns),
        "rows_read": rows_read,
        "rows_used": rows_used,
        "rejected": {reason: [entry.count, list(entry.first_rows), entry.detail] for reason, entry in rejected.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _load(folder: Path, name: str, split: str) -> EncodedSource:
    """Read a complete cache entry and log how its source was read."""
    import datasets

    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["rows_used"]:
        used = datasets.load_from_disk(str(folder / "used"))
    else:
        features = datasets.Features({k: v for k, v in row_features().items() if k not in ("reason", "detail")})
        used = datasets.Dataset.from_dict({column: [] for column in features}, features=features)
    ignored = f"; columns not read: {some_names(meta['ignored_columns'])}" if meta["ignored_columns"] else ""
    logger.info(f"{name}: read as {meta['format']}, since {meta['format_reason']}{ignored}")
    warn_about_hard_labels(used.with_format("numpy")["soft_label"][:] if len(used) else [], name)
    rejected = {
        reason: RejectionCount(count, tuple(rows), detail) for reason, (count, rows, detail) in meta["rejected"].items()
    }
    report = SourceReport(
        name=name,
        split=split,
        format=meta["format"],
        format_reason=meta["format_reason"],
        rows_read=meta["rows_read"],
        rows_used=meta["rows_used"],
        rejected=rejected,
        ignored_columns=tuple(meta["ignored_columns"]),
    )
    assert report.rows_read == report.rows_used + report.rows_rejected, report
    return EncodedSource(used, report, folder / "rejected.jsonl")
