"""Read every row of the sources once, in several processes; keep hashes of all pairs, and the groups of the sample."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data_review.label_conflicts import Mask
from rm_scale.data_review.pair_hashes import PairHashes
from rm_scale.data_review.read_groups import SourceGroups
from rm_scale.errors import DataError

FEW_ROWS = 20_000
"""Fewer are read in this process: to start others would take longer."""


@dataclass
class ChunkScan:
    """What is kept of a chunk.

    Attributes:
        rows: (G,) numbers of the rows that could be read as groups.
        hashes: of their pairs; groups are numbered from 0 in each chunk.
        sampled: row and group of those that are looked at closely.
    """

    rows: npt.NDArray[np.int64]
    hashes: PairHashes
    sampled: list[tuple[int, PreferenceGroup]] = field(default_factory=list)


@dataclass(frozen=True)
class _Work:
    """What forked processes take along."""

    sources: Sequence[SourceGroups]
    chosen: Sequence[Mask]

    def scan(self, job: tuple[int, int]) -> ChunkScan:
        number, place = job
        source, chosen = self.sources[number], self.chosen[number]
        rows: list[int] = []
        found = ChunkScan(np.zeros(0, dtype=np.int64), PairHashes())
        chunk = source.chunks[place]
        # By its place, since the number of a row behind blank lines may be larger than that of all rows.
        for index, (row, group) in enumerate(source.read(chunk), chunk.first_row):
            if isinstance(group, PreferenceGroup):
                found.hashes.add(len(rows), group)
                rows.append(row)
                if chosen[index]:
                    found.sampled.append((row, group))
        found.rows = np.asarray(rows, dtype=np.int64)
        return found


_work: _Work | None = None


def scan(
    sources: Sequence[SourceGroups], chosen: Sequence[Mask], num_processes: int
) -> Iterator[tuple[int, ChunkScan]]:
    """Yield the number of the source and what is kept of each chunk, in order.

    Args:
        sources: what to read.
        chosen: (rows,) of each source: which rows, by their place, to look at closely.
        num_processes: that read chunks; they are forked, and handle text and arrays alone.

    Raises:
        DataError: a process was killed.
    """
    global _work
    jobs = [(number, place) for number, source in enumerate(sources) for place in range(len(source.chunks))]
    work = _Work(sources, chosen)
    count = min(num_processes, len(jobs)) if sum(map(len, sources)) >= FEW_ROWS else 1
    if count < 2:
        yield from ((job[0], work.scan(job)) for job in jobs)
        return
    _work = work
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork")) as pool:
            for job, found in zip(jobs, pool.map(_scan_in_process, jobs), strict=True):
                yield job[0], found
    except BrokenProcessPool as error:
        raise DataError(
            "a process that examined the data was killed, perhaps for want of memory. Fix: --dataset_num_proc with a "
            "smaller number, or --no_review."
        ) from error
    finally:
        _work = None


def _scan_in_process(job: tuple[int, int]) -> ChunkScan:
    assert _work is not None
    return _work.scan(job)
