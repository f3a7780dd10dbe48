"""The figures on what training data shares with benchmarks and evaluation files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rm_scale.overlap.text_index import KINDS

Side = Literal["prompt", "response"]
SIDES: tuple[Side, ...] = ("prompt", "response")
MEANINGS = {
    "exact": "the same text, letter for letter",
    "normalised": "the same but for case, white space, punctuation and the way of writing a character",
    "ngram": "half or more of the shorter text's runs of 13 tokens stand in the other",
    "minhash": "Jaccard similarity of runs of 3 tokens of at least 0.5; of short texts 0.8",
}


@dataclass(frozen=True)
class SideCounts:
    """Rows whose prompt, or one of whose responses, matches; each row once, under its strongest kind of match.

    Attributes:
        train_rows: rows of the training data by kind.
        benchmark_rows: rows of the file by kind.
    """

    train_rows: Mapping[str, int]
    benchmark_rows: Mapping[str, int]

    @property
    def num_train_rows(self) -> int:
        """Rows of the training data, of all kinds."""
        return sum(self.train_rows.values())

    @property
    def num_benchmark_rows(self) -> int:
        """Rows of the file, of all kinds."""
        return sum(self.benchmark_rows.values())


@dataclass(frozen=True)
class OverlapExample:
    """Two texts that match.

    Attributes:
        side: whether they are prompts or responses.
        kind: how they match.
        share: 1 for the same text, else the share of 13-token runs or the similarity.
        source, row: where the training text stands.
        benchmark_row: where the other stands in its file.
        text, benchmark_text: what they say, cut.
    """

    side: Side
    kind: str
    share: float
    source: str
    row: int
    benchmark_row: int
    text: str
    benchmark_text: str


@dataclass(frozen=True)
class FileOverlap:
    """What the training data shares with one file.

    Attributes:
        name: the file.
        format: what it was read as.
        num_rows: its rows; `num_read` those that could be read.
        train_rows: rows of the training data that match one of its rows by prompt or response.
        benchmark_rows: its rows that a row of the training data matches.
        prompts, responses: the same by side and kind.
        examples: a few of each side and kind.
    """

    name: str
    format: str
    num_rows: int
    num_read: int
    train_rows: int
    benchmark_rows: int
    prompts: SideCounts
    responses: SideCounts
    examples: tuple[OverlapExample, ...] = ()

    @property
    def benchmark_share(self) -> float:
        """Share of the file's readable rows that a row of the training data matches."""
        return self.benchmark_rows / self.num_read if self.num_read else 0.0


@dataclass(frozen=True)
class Contamination:
    """What training data shares with files that it is to be judged by.

    Attributes:
        train_rows: rows of the training data.
        train_rows_read: those that can be read; the others are held against nothing.
        train_rows_matched: rows that match any file, each once.
        rules: the thresholds, by name.
        files: one entry per file.
    """

    train_rows: int
    train_rows_read: int
    train_rows_matched: int
    rules: Mapping[str, float]
    files: tuple[FileOverlap, ...]

    @property
    def share(self) -> float:
        """Share of the readable training rows that match."""
        return self.train_rows_matched / self.train_rows_read if self.train_rows_read else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with shares and the meaning of each kind of match."""
        value = asdict(self)
        for entry, file in zip(value["files"], self.files, strict=True):
            entry["benchmark_share"] = file.benchmark_share
        return {**value, "share": self.share, "kinds": {kind: MEANINGS[kind] for kind in KINDS}}
