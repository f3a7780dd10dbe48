"""Hold training data against benchmark files: those are indexed, and the training rows streamed past them."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from rm_scale.contamination.benchmark_texts import BenchmarkTexts, read_benchmark_texts
from rm_scale.contamination.figures import (
    SIDES,
    Contamination,
    FileOverlap,
    OverlapExample,
    Side,
    SideCounts,
)
from rm_scale.contamination.row_texts import RowTexts
from rm_scale.contamination.source_rows import SourceRows
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.sources import Source
from rm_scale.logs import get_logger
from rm_scale.overlap.text_index import KINDS, Matches, MatchRules, TextIndex
from rm_scale.texts import duration, one_line

logger = get_logger(__name__)

PROMPT_RULES = MatchRules()
RESPONSE_RULES = MatchRules(least_tokens=13)
"""Short answers ("You're welcome!") are given to many questions and say nothing about where they are from."""
_ROWS_AT_ONCE = 2_000
_EXAMPLES_OF_A_KIND = 3
_EXAMPLE_CHARACTERS = 200
_LOG_SECONDS = 30.0


@dataclass(frozen=True)
class RowMatch:
    """One match of a training row.

    Attributes:
        side: prompt or response.
        kind: how it matches.
        against: the file.
        row: the row there.
        share: 1 for the same text, else the share of 13-token runs or the similarity.
        text, against_text: the two texts.
    """

    side: Side
    kind: str
    against: str
    row: int
    share: float
    text: str
    against_text: str


@dataclass(frozen=True)
class ComparedRow:
    """A training row and what it matches.

    Attributes:
        source, row: where it stands; of a JSONL file the number of its line, from 0.
        is_read: whether it can be read.
        matches: every match of one of its texts, the strongest first.
    """

    source: str
    row: int
    is_read: bool
    matches: tuple[RowMatch, ...] = ()


OnRows = Callable[[SourceRows, int, Sequence[ComparedRow]], None]


def compare_with_files(train: Sequence[Source], paths: Sequence[str], on_rows: OnRows | None = None) -> Contamination:
    """Find the training rows whose prompt or one of whose responses is, or nearly is, in other files.

    The files' texts are indexed in memory (about 20 bytes a token and 200 a text); the training data is read once, in
    order, whatever its size.

    Args:
        train: the training data's sources.
        paths: benchmarks, preference files or files of questions; see `read_benchmark_texts`.
        on_rows: is handed a source's rows, the place among them at which a batch begins (behind blank lines it is less
            than the number of its first row), and the batch with what it matches; batches come in order.

    Raises:
        DataError: a file can't be read.
    """
    named = {file.name: file for path in paths for file in read_benchmark_texts(path)}  # a file named twice counts once
    files = list(named.values())
    index = _FilesIndex(files)
    tally = _Tally(files)
    progress = _Progress()
    for source in train:
        with tempfile.TemporaryDirectory(prefix="rm_scale_train_") as work:
            groups = SourceRows.open(source, Path(work))
            start = 0
            for batch in _batches(groups):
                compared = index.compare(source.name, batch)
                tally.add(compared)
                if on_rows is not None:
                    on_rows(groups, start, compared)
                start += len(batch)
                progress.show(len(batch), source.name)
    progress.end()
    return tally.figures()


def _batches(groups: SourceRows) -> Iterator[list[tuple[int, RowTexts | None]]]:
    batch: list[tuple[int, RowTexts | None]] = []
    for row, group in groups:
        batch.append((row, _texts(row, group)))
        if len(batch) == _ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _texts(row: int, group: PreferenceGroup | RejectedRow) -> RowTexts | None:
    return None if isinstance(group, RejectedRow) else RowTexts.of(row, group.prompt, group.responses)


class _Progress:
    """Say from time to time how far the comparison is."""

    def __init__(self) -> None:
        self._start = self._shown = time.monotonic()
        self._rows = 0

    def show(self, rows: int, name: str) -> None:
        self._rows += rows
        if time.monotonic() - self._shown >= _LOG_SECONDS:
            self._shown = time.monotonic()
            logger.info(f"{name}: {self._rows:,} rows compared, {self._rate():,.0f} rows/s")

    def end(self) -> None:
        spent = time.monotonic() - self._start
        logger.info(f"{self._rows:,} training rows compared in {duration(spent)}, {self._rate():,.0f} rows/s")

    def _rate(self) -> float:
        return self._rows / max(time.monotonic() - self._start, 1e-9)


# --- Index -----------------------------------------------------------------------------------------------------------


class _SideIndex:
    """The prompts, or the responses, of all files, each different text once."""

    def __init__(self, side: Side, files: Sequence[BenchmarkTexts]) -> None:
        self.side = side
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, file in enumerate(files):
            for row in file.rows:
                for text in dict.fromkeys(texts_of(row, side)):
                    places[text].append((number, row.row))
        self._texts, self._places = list(places), list(places.values())
        self._index = TextIndex(self._texts, PROMPT_RULES if side == "prompt" else RESPONSE_RULES)
        self._names = [file.name for file in files]

    def matches(self, rows: Sequence[RowTexts]) -> Iterator[tuple[int, RowMatch]]:
        """Yield each match of one of the rows' texts, with the place of the row."""
        texts = [(place, text) for place, row in enumerate(rows) for text in texts_of(row, self.side)]
        found: Matches = self._index.look_up([text for _, text in texts])
        columns = (found.queries.tolist(), found.indexed.tolist(), found.kinds.tolist(), found.shares.tolist())
        for query, indexed, kind, share in zip(*columns, strict=True):
            for number, row in self._places[indexed]:
                place, text = texts[query]
                yield (
                    place,
                    RowMatch(
                        self.side, KINDS[kind], self._names[number], row, round(share, 4), text, self._texts[indexed]
                    ),
                )


def texts_of(row: RowTexts, side: Side) -> tuple[str, ...]:
    """Return a row's texts of one side, without empty ones."""
    texts = (row.prompt,) if side == "prompt" else row.responses
    return tuple(text for text in texts if text)


class _FilesIndex:
    """Prompts and responses of all files."""

    def __init__(self, files: Sequence[BenchmarkTexts]) -> None:
        self._sides = [_SideIndex(side, files) for side in SIDES]

    def compare(self, source: str, batch: Sequence[tuple[int, RowTexts | None]]) -> list[ComparedRow]:
        rows = [texts for _, texts in batch if texts is not None]
        found: dict[int, list[RowMatch]] = defaultdict(list)
        for side in self._sides:
            for place, match in side.matches(rows):
                found[place].append(match)
        compared, place = [], 0
        for row, texts in batch:
            matches = found.get(place, []) if texts is not None else []
            matches.sort(key=lambda match: (KINDS.index(match.kind), -match.share))
            compared.append(ComparedRow(source, row, texts is not None, tuple(matches)))
            place += texts is not None
        return compared


# --- Figures ---------------------------------------------------------------------------------------------------------


class _Tally:
    """Counts what is found, row by row."""

    def __init__(self, files: Sequence[BenchmarkTexts]) -> None:
        self._files = files
        self._rows = self._rows_read = self._rows_matched = 0
        self._of_file = {file.name: _FileTally() for file in files}

    def add(self, compared: Sequence[ComparedRow]) -> None:
        for row in compared:
            self._rows += 1
            self._rows_read += row.is_read
            self._rows_matched += bool(row.matches)
            for name in dict.fromkeys(match.against for match in row.matches):
                self._of_file[name].add(row, [match for match in row.matches if match.against == name])

    def figures(self) -> Contamination:
        rules = {**asdict(PROMPT_RULES), "least_response_tokens": RESPONSE_RULES.least_tokens}
        files = tuple(self._of_file[file.name].figures(file) for file in self._files)
        return Contamination(self._rows, self._rows_read, self._rows_matched, rules, files)


class _FileTally:
    """Counts of one file."""

    def __init__(self) -> None:
        self._train_rows = 0
        self._train = {side: Counter[str]() for side in SIDES}
        self._strongest: dict[Side, dict[int, str]] = {side: {} for side in SIDES}
        self._examples: dict[tuple[Side, str], list[OverlapExample]] = defaultdict(list)

    def add(self, row: ComparedRow, matches: Sequence[RowMatch]) -> None:
        """Count a training row; its matches with this file come strongest first."""
        self._train_rows += 1
        for side in SIDES:
            own = [match for match in matches if match.side == side]
            if own:
                self._train[side][own[0].kind] += 1
                self._keep_example(row, own[0])
            for match in own:
                kept = self._strongest[side].get(match.row, match.kind)
                self._strongest[side][match.row] = min(kept, match.kind, key=KINDS.index)

    def _keep_example(self, row: ComparedRow, match: RowMatch) -> None:
        kept = self._examples[match.side, match.kind]
        if len(kept) < _EXAMPLES_OF_A_KIND:
            texts = (one_line(text, _EXAMPLE_CHARACTERS) for text in (match.text, match.against_text))
            kept.append(OverlapExample(match.side, match.kind, match.share, row.source, row.row, match.row, *texts))

    def figures(self, file: BenchmarkTexts) -> FileOverlap:
        prompts, responses = (
            SideCounts(_by_kind(self._train[side]), _by_kind(Counter(self._strongest[side].values()))) for side in SIDES
        )
        rows = len(set(chain.from_iterable(self._strongest[side] for side in SIDES)))
        examples = [e for side in SIDES for kind in KINDS for e in self._examples.get((side, kind), ())]
        return FileOverlap(
            file.name,
            file.format,
            file.num_rows,
            len(file.rows),
            self._train_rows,
            rows,
            prompts,
            responses,
            tuple(examples),
        )


def _by_kind(counts: Counter[str]) -> dict[str, int]:
    return {kind: counts[kind] for kind in KINDS}
