"""What training data shares with benchmark files, as lines for a terminal and as findings for the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from rm_scale.contamination.figures import Contamination, FileOverlap, OverlapExample, SideCounts
from rm_scale.data_review.finding import Example, Finding, Suggestion
from rm_scale.overlap.text_index import KINDS
from rm_scale.reporting.data.data_summary import share_text

_WORDS = {"exact": "exact", "normalised": "normalised", "ngram": "by 13-grams", "minhash": "by MinHash"}
_ADVICE = (
    "A benchmark whose rows were trained on measures memory. Train without these rows, or don't judge by that file."
)


def contamination_text(found: Contamination) -> str:
    """Return what `rm-scale data --against` prints."""
    lines = [
        f"contamination: {found.train_rows_matched:,} of {found.train_rows_read:,} training rows "
        f"({share_text(found.share)}) match rows of {_files(len(found.files))}"
    ]
    for file in found.files:
        lines += _file_lines(file)
    if found.train_rows_matched:
        lines += [f"  {_ADVICE}", "  Fix: --drop FILE.jsonl lists the rows; --kept DIR writes the data without them."]
    return "\n".join(lines)


def _files(count: int) -> str:
    return "the file" if count == 1 else f"the {count} files"


def _file_lines(file: FileOverlap) -> list[str]:
    unread = f", {file.num_rows - file.num_read:,} can't be read" if file.num_read < file.num_rows else ""
    lines = [
        f"{'!' if file.train_rows else '-'} {file.name} ({file.format}, {file.num_rows:,} rows{unread}): "
        f"{file.benchmark_rows:,} of its rows ({share_text(file.benchmark_share)}) are in {file.train_rows:,} "
        "training rows"
    ]
    for name, counts in (("prompts", file.prompts), ("responses", file.responses)):
        if counts.num_train_rows:
            lines.append(f"    {name}: {_counts_text(counts)}")
    lines += [f"    {_example_text(example)}" for example in _one_of_each(file.examples)]
    return lines


def _counts_text(counts: SideCounts) -> str:
    def listed(rows: Mapping[str, int]) -> str:
        return ", ".join(f"{rows[kind]:,} {_WORDS[kind]}" for kind in KINDS if rows[kind])

    return f"training rows: {listed(counts.train_rows)}; rows of the file: {listed(counts.benchmark_rows)}"


def _one_of_each(examples: Sequence[OverlapExample]) -> list[OverlapExample]:
    return list({(example.side, example.kind): example for example in reversed(examples)}.values())[::-1]


def _example_text(example: OverlapExample) -> str:
    share = "" if example.share == 1 else f" {example.share:.2f}"
    texts = f"{example.text[:80]!r}"
    if example.benchmark_text != example.text:
        texts += f" and {example.benchmark_text[:80]!r}"
    return (
        f"e.g. {example.side} {_WORDS[example.kind]}{share}: {example.source} row {example.row} and row "
        f"{example.benchmark_row}: {texts}"
    )


def contamination_findings(found: Contamination) -> list[Finding]:
    """Return one finding per file, for the page of `rm-scale data`."""
    return [_finding(found, file) for file in found.files]


def _finding(found: Contamination, file: FileOverlap) -> Finding:
    parts = [
        f"{name}: {_counts_text(counts)}"
        for name, counts in (("Prompts", file.prompts), ("Responses", file.responses))
        if counts.num_train_rows
    ]
    meaning = (
        f"{file.benchmark_rows:,} of {file.num_read:,} rows of {file.name} ({share_text(file.benchmark_share)}) are in "
        f"the training data, or nearly so. {' '.join(f'{part}.' for part in parts)} {_ADVICE}"
    )
    settings = f"--against {shlex.quote(file.name)} --drop dropped.jsonl --kept clean_data"
    return Finding(
        name=f"contamination:{file.name}",
        title=f"Training rows that are in {file.name}",
        level="problem" if file.train_rows else "nothing",
        count=file.train_rows,
        out_of=found.train_rows_read,
        unit="rows",
        sampled=False,
        meaning=meaning,
        examples=tuple(_page_example(file, example) for example in file.examples),
        suggestion=Suggestion("Write the training data without them, then train on what is kept.", settings)
        if file.train_rows
        else None,
    )


def _page_example(file: FileOverlap, example: OverlapExample) -> Example:
    where = f"{example.side} of {file.name}, row {example.benchmark_row} ({_WORDS[example.kind]}, {example.share:.2f})"
    return Example(example.source, (example.row,), {example.side: example.text, where: example.benchmark_text})
