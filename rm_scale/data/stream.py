"""Encoded groups of a stream, in blocks: each is read, encoded and shuffled by itself when training comes to it.

The order is a function of the sources, the seed and the size of a block alone, so that every rank and every resumed run
finds the same groups under the same numbers. What a block held is recorded, so that a resumed run begins at the block
where it stopped and reads nothing before it again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rm_scale.data.encoded_rows import encode_batch, row_features
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.formats import RowReader
from rm_scale.data.rejected_rows import FILTERED
from rm_scale.errors import DataError
from rm_scale.logs import get_logger

if TYPE_CHECKING:
    import pyarrow as pa

logger = get_logger(__name__)

_ENCODED_AT_ONCE = 256


@dataclass(frozen=True)
class StreamSource:
    """One source of a stream.

    Attributes:
        name: its name in reports.
        reader: turns its rows into groups.
        rows: yields number and value of each row from a given number on; a row that can't be read is a `RejectedRow`.
    """

    name: str
    reader: RowReader
    rows: Callable[[int], Iterator[tuple[int, Any]]]


@dataclass(frozen=True)
class BlockRecord:
    """What one block of a stream held.

    Attributes:
        number: of the block, from 0.
        source, row: where it begins: index of the source, and row of it.
        rows: rows read.
        used: groups that they became.
        rejected: rows refused, per reason.
        following: source and row at which the next block begins; `None` where the stream begins again.
    """

    number: int
    source: int
    row: int
    rows: int
    used: int
    rejected: dict[str, int]
    following: tuple[int, int] | None

    @property
    def ends_pass(self) -> bool:
        """Whether the stream begins again after this block."""
        return self.following is None


class GroupStream:
    """The groups of several sources one after the other, again and again, numbered from 0.

    Args:
        sources: read in this order.
        encoder: how text becomes tokens.
        block_rows: rows that are shuffled together.
        seed: of the order; `None` keeps the order of the rows.
        fits: tells of each group of a table whether a row of a micro-batch can hold it; others are rejected.
        max_rejected_share: of the rows read so far; where more are refused, the run ends.
        record_path: JSON lines of what the blocks held, read at the start and added to; `None` to keep none.
        identity: what must be unchanged for that record to be valid, as JSON values.
        writes: this process adds to the record.

    Raises:
        DataError: the record is of other sources or settings.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        encoder: TextEncoder,
        block_rows: int,
        seed: int | None,
        fits: Callable[[pa.Table], npt.NDArray[np.bool_]] | None = None,
        max_rejected_share: float = 1.0,
        record_path: Path | None = None,
        identity: Any = None,
        writes: bool = True,
    ) -> None:
        self.sources = list(sources)
        self.encoder = encoder
        self.block_rows = block_rows
        self.seed = seed
        self._fits = fits
        self.max_rejected_share = max_rejected_share
        self._record_path = record_path if writes else None
        self.blocks = _read_record(record_path, identity, writes) if record_path is not None else []
        self._identity = identity
        self._rows: Iterator[tuple[int, int, Any]] | None = None
        self._rows_at: tuple[int, int] | None = None
        self._following: tuple[int, int, Any] | None = None
        self._held: dict[int, pa.Table] = {}
        self._ahead: tuple[int, Future[pa.Table]] | None = None
        self._is_closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="stream")  # one: it alone reads and notes blocks

    # --- What others read ----------------------------------------------------------------------------------------

    def groups(self, first: int, count: int) -> list[dict[str, Any]]:
        """Return the groups numbered `first` and on, as rows of an encoded data set (`encoded_rows.row_features`).

        Raises:
            DataError: a source can't be read further, or a whole pass over them has no usable row.
        """
        found: list[dict[str, Any]] = []
        number, before = self._block_of(first)
        place = first - before
        while len(found) < count:
            block = self._block(number)
            found += block.slice(place, count - len(found)).to_pylist()
            number, place = number + 1, 0
        return found

    def rejected(self) -> Counter[str]:
        """Return the rows refused so far, per reason."""
        return sum((Counter(block.rejected) for block in self.blocks), Counter())

    def summary(self) -> str:
        """Return the rows read so far and what became of them, in a line."""
        rejected = self.rejected()
        rows, used = (sum(getattr(block, name) for block in self.blocks) for name in ("rows", "used"))
        counts = ", ".join(f"{reason} {count:,}" for reason, count in rejected.most_common())
        reasons = f" ({counts})" if counts else ""
        names = ", ".join(source.name for source in self.sources[:3]) + (", ..." if len(self.sources) > 3 else "")
        return f"stream of {names}: {rows:,} rows read, {used:,} used, {rejected.total():,} left out{reasons}"

    def close(self) -> None:
        """End the thread that encodes ahead, after the rows that it is at."""
        self._is_closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)

    # --- Blocks --------------------------------------------------------------------------------------------------

    def _block_of(self, group: int) -> tuple[int, int]:
        """Return the block that holds a group, and the number of groups before it."""
        before = number = 0
        while True:
            if number == len(self.blocks):
                self._block(number)  # reads it, and so records what it held
            used = self.blocks[number].used
            if before + used > group:
                return number, before
            before, number = before + used, number + 1

    def _block(self, number: int) -> pa.Table:
        """Return a block's groups, and begin to encode the next one."""
        if number not in self._held:
            self._held = {number: self._take(number)}
        if self._ahead is None or self._ahead[0] != number + 1:
            self._ahead = (number + 1, self._worker.submit(self._encode, number + 1))
        return self._held[number]

    def _take(self, number: int) -> pa.Table:
        if self._ahead is not None:
            ahead, future = self._ahead
            self._ahead = None
            groups = future.result()
            if ahead == number:
                return groups
        return self._worker.submit(self._encode, number).result()

    def _encode(self, number: int) -> pa.Table:
        """Read, encode and shuffle a block; what it held is recorded the first time.

        Raises:
            DataError: it holds other rows than when it was recorded, or too many rows have been refused.
        """
        start = self._start_of(number)
        raw, following = self._read(start)
        if not raw:
            raise DataError("the sources hold no row at all. Fix: check the files of dataset_path.")
        used, rejected = self._encoded(raw)
        if self.seed is not None:
            order = np.random.Generator(np.random.Philox(key=[self.seed, number])).permutation(len(used))
            used = used.take(order)
        if number == len(self.blocks):
            self._note(BlockRecord(number, *start, len(raw), len(used), dict(rejected), following))
            self._judge_losses()
        elif len(used) != self.blocks[number].used:
            raise DataError(
                f"block {number} of the stream holds {len(used):,} usable rows, and held {self.blocks[number].used:,} "
                "when it was read first: the order of the groups can't be followed. Fix: begin a new run (another "
                "--output_dir)."
            )
        return used

    def _note(self, block: BlockRecord) -> None:
        self.blocks.append(block)
        if self._record_path is None:
            return
        with self._record_path.open("a", encoding="utf-8") as stream:
            if block.number == 0:
                stream.write(json.dumps({"identity": self._identity}) + "\n")
            stream.write(json.dumps(asdict(block)) + "\n")

    def _judge_losses(self) -> None:
        """Stop when too many rows have been refused so far.

        Raises:
            DataError: names the reasons and their counts.
        """
        rejected = self.rejected()
        rows = sum(block.rows for block in self.blocks) - rejected.pop(FILTERED, 0)
        lost = rejected.total()
        if self.blocks[-1].ends_pass and not any(block.used for block in self.blocks):
            raise DataError(f"the stream ends without a usable row. {self._losses(rejected, rows)}")
        if lost > self.max_rejected_share * rows:
            raise DataError(self._losses(rejected, rows))

    def _losses(self, rejected: Counter[str], rows: int) -> str:
        filtered = sum(block.rejected.get(FILTERED, 0) for block in self.blocks)
        left_out = f", {filtered:,} more are left out by filters" if filtered else ""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejected.most_common()) or "none"
        return (
            f"{rejected.total():,} of the first {rows:,} rows of the stream can't be used (by reason: {reasons}"
            f"{left_out}); at most {self.max_rejected_share:.1%} may be lost. Fix: rm-scale data with "
            "--streaming false names these rows; or --max_rejected_share with a larger share."
        )

    def _start_of(self, number: int) -> tuple[int, int]:
        """Return source and row at which a block begins, which is recorded or follows the last one that is."""
        if number < len(self.blocks):
            return self.blocks[number].source, self.blocks[number].row
        assert number == len(self.blocks), "blocks are read one after the other"
        return (self.blocks[-1].following if self.blocks else None) or (0, 0)

    def _read(self, start: tuple[int, int]) -> tuple[list[tuple[int, int, Any]], tuple[int, int] | None]:
        """Return the rows of the block that begins at `start`, and where the next one begins: `None` at the end."""
        if self._rows is None or self._rows_at != start:
            self._rows = self._all_rows(*start)
            self._following = next(self._rows, None)
        rows: list[tuple[int, int, Any]] = []
        while self._following is not None and len(rows) < self.block_rows:
            rows.append(self._following)
            self._following = next(self._rows, None)
        self._rows_at = self._following[:2] if self._following is not None else None
        return rows, self._rows_at

    def _all_rows(self, source: int, row: int) -> Iterator[tuple[int, int, Any]]:
        for number in range(source, len(self.sources)):
            for index, value in self.sources[number].rows(row if number == source else 0):
                yield number, index, value

    def _encoded(self, raw: Sequence[tuple[int, int, Any]]) -> tuple[pa.Table, Counter[str]]:
        """Encode rows, as many at once as are of one source; return the groups and why the others were refused."""
        import pyarrow as pa

        schema = row_features().arrow_schema
        batches, rejected = [], Counter[str]()
        for source, rows in groupby(raw, key=lambda row: row[0]):
            pairs = [(index, value) for _, index, value in rows]
            for first in range(0, len(pairs), _ENCODED_AT_ONCE):
                if self._is_closed:
                    raise CancelledError
                part = pairs[first : first + _ENCODED_AT_ONCE]
                encoded = encode_batch(part, self.sources[source].reader, self.encoder, schema)
                batches.append(encoded.used)
                rejected.update(reason for _, reason, _ in encoded.rejected)
        table = pa.Table.from_batches(batches, schema)
        if self._fits is None or not len(table):
            return table, rejected
        fits = self._fits(table)
        rejected.update({"over_long": int((~fits).sum())})
        return table.filter(pa.array(fits)), +rejected


def _read_record(path: Path, identity: Any, writes: bool) -> list[BlockRecord]:
    """Return the blocks that an earlier attempt has recorded; a last line that was cut short does not count.

    Args:
        path: the record.
        identity: what it must be of.
        writes: cut such a line off, so that what is written next does not stand behind it.

    Raises:
        DataError: they are of other sources or settings.
    """
    if not path.exists():
        return []
    lines, whole = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            lines.pop()
            break
        whole += len(line)
    if lines and lines[0].get("identity") != json.loads(json.dumps(identity)):
        raise DataError(
            f"{path}: is of other files or settings than those of this run, so its order can't be followed. Fix: give "
            "the files and settings that the run began with, or begin a new run (another --output_dir)."
        )
    if writes and whole < path.stat().st_size:
        os.truncate(path, whole)
    blocks = [_block_record(line) for line in lines[1:]]
    assert [block.number for block in blocks] == list(range(len(blocks))), path
    return blocks


def _block_record(line: dict[str, Any]) -> BlockRecord:
    following = line["following"]
    return BlockRecord(**{**line, "following": tuple(following) if following is not None else None})
