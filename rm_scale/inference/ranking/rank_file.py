"""Rank the completions of a file: read groups, rank each, choose what is written, and account for every prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rm_scale.data.rejected_rows import REJECTION_REASONS
from rm_scale.errors import DataError
from rm_scale.inference.ranking.best_of_n import CurveSamples
from rm_scale.inference.ranking.candidates import CandidateGroup, Columns, InputReport, number_or_none, read_groups
from rm_scale.inference.ranking.output_rows import select
from rm_scale.inference.ranking.rank_candidates import RankedGroup
from rm_scale.inference.ranking.rank_report import RankReport
from rm_scale.inference.ranking.row_spool import RowSpool
from rm_scale.inference.ranking.selection import Selected, Selection
from rm_scale.inference.scoring.row_files import RowFile, open_rows, write_rows

_ROWS_AT_ONCE = 512

Rank = Callable[[Iterable[CandidateGroup]], Iterator[RankedGroup]]
"""Gives groups their scores: a model's, or those that came with them."""


def rank_file(
    source: str,
    output: Path,
    columns: Columns,
    rank: Rank,
    how: Selection,
    max_rejected_share: float,
    samples: CurveSamples | None = None,
    gold_column: str | None = None,
) -> tuple[InputReport, RankReport]:
    """Rank a file's completions and write what `how` asks for, and beside it what was left out.

    Args:
        source: JSONL, JSON, CSV or Parquet.
        output: ends in .jsonl, .jsonl.gz, .csv or .parquet; whole or not at all.
        columns: how rows are read.
        rank: scores groups.
        how: what is written of each.
        max_rejected_share: of rows, and of completions, that may be unusable.
        samples: collects the scores for best-of-n curves, if any are drawn.
        gold_column: a second, trusted score of each completion, for the same curves.

    Raises:
        DataError: the file can't be read, or too much of it can't be used; then nothing is written.
    """
    met, report = InputReport(), RankReport()
    rows, left_out = RowSpool(output.parent), RowSpool(output.parent)
    with open_rows(source) as file:
        for group, selected in _select(rank(read_groups(_read(file), columns, met)), how, report):
            for row in selected.rows:
                rows.write(row)
            for line in left_out_lines(group, selected):
                left_out.write(line)
            if samples is not None:
                _add_sample(samples, group, gold_column)
    _require_enough(source, met, report, max_rejected_share)
    write_rows(rows.parts(), output)
    write_rows(left_out.parts(), left_out_path(output))
    return met, report


def _read(file: RowFile) -> Iterator[tuple[int, Any]]:
    for start in range(0, len(file), _ROWS_AT_ONCE):
        yield from file.read(start, start + _ROWS_AT_ONCE)


def _select(
    ranked: Iterable[RankedGroup], how: Selection, report: RankReport
) -> Iterator[tuple[RankedGroup, Selected]]:
    with tqdm(unit=" completions", desc="ranking", mininterval=1.0, disable=None) as progress:
        for group in ranked:
            selected = select(group, how)
            report.add(group, selected)
            progress.update(len(group.scores))
            yield group, selected


def _add_sample(samples: CurveSamples, group: RankedGroup, gold_column: str | None) -> None:
    gold = None
    if gold_column is not None:
        values = group.group.per_completion[gold_column]
        gold = [number_or_none(values[place]) for place in group.order]
    samples.add([group.score(place) for place in group.order], gold)


# --- What was left out -----------------------------------------------------------------------------------------------


def left_out_path(output: Path) -> Path:
    """Return where the prompts and completions that were left out are listed, beside the output."""
    return output.with_name(f"{output.name}.left_out.jsonl")


def left_out_lines(ranked: RankedGroup, selected: Selected) -> Iterator[dict[str, Any]]:
    """Yield one line per completion without a score, and one for a prompt without an output row."""
    first = ranked.group.rows[0]
    for place, reason in enumerate(ranked.problems):
        if reason is not None:
            yield {"row": first, "place": place, "reason": reason}
    if selected.left_out is not None:
        yield {"row": first, "place": None, "reason": selected.left_out}


def _require_enough(source: str, met: InputReport, report: RankReport, max_rejected_share: float) -> None:
    """Stop before the output appears when too much of the input could not be used."""
    for what, lost, of, lines in (
        ("rows", met.refused.total(), met.num_rows, refused_row_lines(met)),
        ("completions", report.unscored.total(), report.num_completions, report.unscored_lines()),
    ):
        if lost > max_rejected_share * of:
            share = min(1.0, math.ceil(100 * lost / of) / 100)
            accept = f", or accept the loss with --max_rejected_share {share:g}" if lost < of else ""
            raise DataError(
                f"{source}: {lost} of {of} {what} can't be used, and --max_rejected_share is "
                f"{max_rejected_share:g}; nothing was written.\n  " + "\n  ".join(lines) + f"\nFix: mend them{accept}."
            )


def refused_row_lines(met: InputReport) -> list[str]:
    """Return why rows can't be used, a line for each reason with the first rows that have it."""
    lines = []
    for reason, count in met.refused.most_common():
        first = "; ".join(f"row {row}{': ' + detail if detail else ''}" for row, detail in met.examples[reason][:3])
        lines.append(f"rows that can't be used: {reason} {count}: {REJECTION_REASONS[reason]} ({first})")
    return lines
