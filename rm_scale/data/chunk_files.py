"""The files of an encoded source: those of each chunk, and what is joined of them once all chunks are there.

A chunk is a folder that appears under its name when it is complete. Token ids stay in the chunks' Arrow files, which
are mapped into memory as one table; the arrays of lengths and hashes are joined to one file each, mapped as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from rm_scale.data.data_report import NUM_FIRST_ROWS, RejectionCount
from rm_scale.data.encoded_rows import GROUP_ARRAYS, RESPONSE_ARRAYS, Array, EncodedBatch, Rejected, row_features
from rm_scale.data.rejected_rows import FILTERED
from rm_scale.files import naming

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_TABLE, _ARRAYS, _REJECTED, _COUNTS = "used.arrow", "arrays.npz", "rejected.jsonl", "counts.json"
_KINDS = {**GROUP_ARRAYS, **RESPONSE_ARRAYS}
_COPIED_BYTES = 1 << 20
_WRITTEN_BYTES = 32 << 20


@dataclass(frozen=True)
class GroupArrays:
    """What splitting and statistics need of the groups of a source, as arrays that may be mapped files.

    Attributes:
        prompt_length: (G,) leading tokens that a group's sequences share.
        num_tokens: (G,) tokens of all its sequences.
        sizes: (G,) its number of responses.
        prompt_key, group_key: (G,) hashes of the prompt, and of prompt and responses.
        plain_prompt_key: (G,) hash of the normalised prompt.
        lengths: (R,) tokens per sequence, group after group; R is the number of responses of all groups.
        ranks: (R,) ranks in the same order.
    """

    prompt_length: Array
    num_tokens: Array
    sizes: Array
    prompt_key: Array
    group_key: Array
    plain_prompt_key: Array
    lengths: Array
    ranks: Array


@dataclass
class RowCounts:
    """What became of rows.

    Attributes:
        used: rows that became groups.
        responses: their responses.
        rejected: per reason.
        soft_labels, hard_labels: rows with a soft label, and those of which it is exactly 0 or 1.
    """

    used: int = 0
    responses: int = 0
    rejected: dict[str, RejectionCount] = field(default_factory=dict)
    soft_labels: int = 0
    hard_labels: int = 0

    @property
    def read(self) -> int:
        """Rows in all."""
        return self.used + sum(entry.count for entry in self.rejected.values())

    def add(self, other: RowCounts) -> None:
        """Add the counts of the rows that follow."""
        self.used += other.used
        self.responses += other.responses
        self.soft_labels += other.soft_labels
        self.hard_labels += other.hard_labels
        for reason, entry in other.rejected.items():
            known = self.rejected.get(reason, RejectionCount(0, ()))
            self.rejected[reason] = RejectionCount(
                known.count + entry.count,
                (*known.first_rows, *entry.first_rows)[:NUM_FIRST_ROWS],
                known.detail if known.count else entry.detail,
            )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RowCounts:
        """Return what `to_json` wrote."""
        rejected = {
            reason: RejectionCount(entry["count"], tuple(entry["first_rows"]), entry["detail"])
            for reason, entry in sorted(values["rejected"].items())
        }
        return cls(**{**values, "rejected": rejected})


# --- One chunk -----------------------------------------------------------------------------------------------------


def write_chunk(folder: Path, batches: Iterable[EncodedBatch]) -> RowCounts:
    """Write the files of one chunk to an empty folder; no more than some 32 MB of it are held in memory."""
    import pyarrow as pa

    counts = RowCounts()
    parts: dict[str, list[Array]] = {name: [] for name in _KINDS}
    schema = row_features().arrow_schema
    waiting: list[pa.RecordBatch] = []
    with (
        naming(folder / _TABLE),
        pa.OSFile(str(folder / _TABLE), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as table,
        (folder / _REJECTED).open("w", encoding="utf-8") as rejected,
    ):
        for batch in batches:
            counts.add(counts_of(batch))
            if batch.used.num_rows:
                waiting.append(batch.used)
            if sum(part.nbytes for part in waiting) >= _WRITTEN_BYTES:
                _write(table, waiting)
            for name, array in batch.arrays.items():
                parts[name].append(array)
            for row in batch.rejected:
                if row[1] != FILTERED:
                    rejected.write(_rejected_line(row))
        _write(table, waiting)
    with naming(folder / _ARRAYS), (folder / _ARRAYS).open("wb") as stream:
        np.savez(stream, **{name: _joined(arrays, name) for name, arrays in parts.items()})  # type: ignore[arg-type]
    with naming(folder / _COUNTS):
        (folder / _COUNTS).write_text(json.dumps(counts.to_json()), encoding="utf-8")
    return counts


def _write(table: pa.ipc.RecordBatchStreamWriter, waiting: list[pa.RecordBatch]) -> None:
    """Write batches as one: whoever opens the file keeps some 20 kB in memory for each."""
    import pyarrow as pa

    if waiting:
        (together,) = pa.Table.from_batches(waiting).combine_chunks().to_batches()
        table.write_batch(together)
        waiting.clear()


def read_counts(chunk: Path) -> RowCounts:
    """Return what became of the rows of a chunk."""
    return RowCounts.from_json(json.loads((chunk / _COUNTS).read_text(encoding="utf-8")))


def _joined(arrays: Sequence[Array], name: str) -> Array:
    return np.concatenate(arrays) if arrays else np.zeros(0, _KINDS[name])


def counts_of(batch: EncodedBatch) -> RowCounts:
    """Return what became of the rows of a batch."""
    labels = batch.used.column("soft_label").drop_null().to_numpy(zero_copy_only=False)
    counts = RowCounts(
        batch.used.num_rows, len(batch.arrays["lengths"]), {}, len(labels), int(np.isin(labels, (0.0, 1.0)).sum())
    )
    for row, reason, detail in batch.rejected:
        counts.add(RowCounts(rejected={reason: RejectionCount(1, (row,), detail)}))
    return counts


def _rejected_line(rejected: Rejected) -> str:
    row, reason, detail = rejected
    return json.dumps({"row": row, "reason": reason, "detail": detail}) + "\n"


# --- All of a source -----------------------------------------------------------------------------------------------


def join_chunks(folder: Path, chunks: Sequence[Path]) -> RowCounts:
    """Join what is read as a whole, from complete chunks, in order, to files in `folder`; return the summed counts.

    Nothing that a chunk needs to be joined again is removed.
    """
    counts = RowCounts()
    for chunk in chunks:
        counts.add(read_counts(chunk))
    counts.rejected = dict(sorted(counts.rejected.items()))
    _join_arrays(folder, chunks, counts)
    with naming(folder / _REJECTED), (folder / _REJECTED).open("wb") as stream:
        for chunk in chunks:
            with (chunk / _REJECTED).open("rb") as part:
                shutil.copyfileobj(part, stream, _COPIED_BYTES)
    return counts


def remove_parts(chunks: Iterable[Path]) -> None:
    """Remove from chunks what `join_chunks` has joined."""
    for chunk in chunks:
        for name in (_ARRAYS, _REJECTED, _COUNTS):
            (chunk / name).unlink(missing_ok=True)


def _join_arrays(folder: Path, chunks: Sequence[Path], counts: RowCounts) -> None:
    """Write the chunks' arrays, one behind the other, to a file for each kind.

    Written, not mapped: a mapped file that the disk has no room for would end the process without a word.
    """
    sizes = {**dict.fromkeys(GROUP_ARRAYS, counts.used), **dict.fromkeys(RESPONSE_ARRAYS, counts.responses)}
    with ExitStack() as opened:
        streams = {name: opened.enter_context(_writing(folder / f"{name}.npy")) for name in sizes}
        for name, stream in streams.items():
            header = {"descr": np.dtype(_KINDS[name]).str, "fortran_order": False, "shape": (sizes[name],)}
            np.lib.format.write_array_header_1_0(stream, header)
        for chunk in chunks:
            with np.load(chunk / _ARRAYS) as parts:
                for name, stream in streams.items():
                    stream.write(parts[name].tobytes())


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    with naming(path), path.open("wb") as stream:
        yield stream


def rejected_file(folder: Path) -> Path:
    """Return the file of the rejected rows of a complete source, a JSON line each."""
    return folder / _REJECTED


def open_arrays(folder: Path, num_groups: int) -> GroupArrays:
    """Map the joined arrays of a complete source into memory."""
    mode: Literal["r"] | None = "r" if num_groups else None  # nothing can't be mapped
    return GroupArrays(**{name: np.load(folder / f"{name}.npy", mmap_mode=mode) for name in _KINDS})


def open_table(chunks: Sequence[Path], fingerprint: str) -> Dataset:
    """Map the encoded rows of chunks into memory as one data set.

    Args:
        chunks: the complete chunks of a source, in order.
        fingerprint: of the data set: the same for the same content.
    """
    import datasets
    from datasets.table import MemoryMappedTable, concat_tables

    features = row_features()
    tables = [MemoryMappedTable.from_file(str(chunk / _TABLE)) for chunk in chunks]
    if not tables:
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    table = concat_tables(tables) if len(tables) > 1 else tables[0]
    return datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint=fingerprint)
