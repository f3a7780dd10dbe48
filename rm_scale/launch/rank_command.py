"""`rm-scale rank`: best-of-N: rank completions, choose the best, make preference pairs, draw the curve over n."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.errors import ConfigError, DataError
from rm_scale.launch.score_command import MAX_TOKENS, add_scoring_arguments, load_scorer, rank_device
from rm_scale.logs import get_logger

if TYPE_CHECKING:
    from rm_scale.inference.best_of_n import BestOfN, CurveSamples
    from rm_scale.inference.candidates import CandidateGroup, Columns, InputReport
    from rm_scale.inference.ranking import RankedGroup, RankReport, Selected, Selection
    from rm_scale.inference.rows import RowFile

logger = get_logger(__name__)

HELP = "best-of-N: rank completions, make preference pairs"
DESCRIPTION = (
    "Score several completions of each prompt, each prompt computed once, and write them ranked, the best of them, or "
    "chosen/rejected pairs. Rows hold `prompt` and `completions` (a list), or `prompt` and `completion` with the rows "
    "of a prompt behind one another. See docs/best_of_n.md."
)
FORMATS = ("ranked", "top", "best", "pairs")
PAIRS = ("best_worst", "best_random", "adjacent", "all")
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
TIES = ("first", "random", "skip")
_READ_ROWS = 512
# Options that only one output format reads.
_OPTION_OF_FORMAT = {
    "top_k": "top",
    "min_score": "best",
    "pairs": "pairs",
    "min_margin": "pairs",
    "margin_column": "pairs",
}

_LEAST = {
    "top_k": 1,
    "max_n": 1,
    "num_resamples": 100,
    "max_tokens_per_batch": 1,
    "min_margin": 0,
    "max_rejected_share": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rm-scale rank`."""
    _add_files(parser)
    _add_selection(parser)
    _add_curves(parser)
    add_scoring_arguments(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("--model", metavar="DIR", help="a run's output directory, adapter or full model")
    files.add_argument("--input", required=True, metavar="FILE", help="completions: JSONL, JSON, CSV or Parquet")
    files.add_argument("--output", required=True, metavar="FILE", help="JSONL, CSV or Parquet; never half-written")
    files.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    files.add_argument("--summary", metavar="FILE.json", help="the summary as JSON, too")
    files.add_argument(
        "--group_by", metavar="COLUMN", help="rows with the same value belong together; holds the input in memory"
    )
    files.add_argument(
        "--per_completion", nargs="+", default=[], metavar="COLUMN", help="columns with one value per completion"
    )
    files.add_argument(
        "--score_column", metavar="COLUMN", help="rank by scores that the input holds already, without --model"
    )
    files.add_argument(
        "--max_rejected_share", type=float, default=0.05, help="stop when more rows or completions can't be used"
    )


def _add_selection(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_argument_group("what is written")
    chosen.add_argument("--output_format", choices=FORMATS, default="ranked")
    chosen.add_argument("--top_k", type=int, metavar="K", help="top: completions kept of each prompt (default 1)")
    chosen.add_argument("--min_score", type=float, metavar="X", help="best: leave out prompts whose best scores less")
    chosen.add_argument("--pairs", choices=PAIRS, help="pairs: which completions are compared (default best_worst)")
    chosen.add_argument(
        "--min_margin", type=float, metavar="X", help="pairs: least difference of scores (default: any)"
    )
    chosen.add_argument("--margin_column", metavar="NAME", help="pairs: column with that difference (default margin)")
    chosen.add_argument("--ties", choices=TIES, default="first", help="where a choice falls between equal scores")
    chosen.add_argument("--seed", type=int, default=0, help="of random choices and of the bootstrap")


def _add_curves(parser: argparse.ArgumentParser) -> None:
    curves = parser.add_argument_group("best-of-n curves")
    curves.add_argument("--curves", metavar="FILE.json", help="expected reward and KL of best-of-n for n = 1, 2, ...")
    curves.add_argument("--curves_page", metavar="FILE.html", help="the same, drawn")
    curves.add_argument("--gold_column", metavar="COLUMN", help="a second, trusted score of each completion")
    curves.add_argument("--max_n", type=int, metavar="N", help="largest n (default: completions of most prompts)")
    curves.add_argument("--num_resamples", type=int, default=1000, help="bootstrap resamples of the prompts")


def run(options: argparse.Namespace) -> int:
    """Rank, write, and say what became of every prompt; gives 0."""
    _check(options)
    from rm_scale.inference.candidates import InputReport, read_groups
    from rm_scale.inference.ranking import RankReport, use_given_scores
    from rm_scale.inference.rows import open_rows, write_rows

    columns, how = _columns(options), _selection(options)
    met, report = InputReport(), RankReport()
    samples = _samples(options)
    output = Path(options.output)
    rows, left_out = _Spool(output.parent), _Spool(output.parent)
    with open_rows(options.input) as file:
        groups = read_groups(_read_rows(file), columns, met)
        ranked = use_given_scores(groups) if options.score_column else _score(groups, options)
        for group, selected in _select(ranked, how, report):
            for row in selected.rows:
                rows.write(row)
            for line in left_out_lines(group, selected):
                left_out.write(line)
            _sample(samples, group, options.gold_column)
    _require_enough(met, report, options)
    write_rows(rows.parts(), output)
    write_rows(left_out.parts(), left_out_path(output))
    curves = samples.curves(options.max_n, options.num_resamples, options.seed) if samples is not None else None
    _say(options, met, report, curves)
    return 0


# --- Options -------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    """All that is wrong with the options, before anything is read."""
    problems = [*_source_problems(options), *_selection_problems(options), *_number_problems(options)]
    if problems:
        raise ConfigError(problems, "rm-scale rank: the options can't be used")


def _source_problems(options: argparse.Namespace) -> Iterator[str]:
    if (options.model is None) == (options.score_column is None):
        seen = "neither" if options.model is None else "both"
        yield (
            f"--model and --score_column: {seen} given, one is needed. Fix: --model DIR scores the completions; "
            "--score_column COLUMN takes scores that the input holds."
        )
    if not options.output.lower().endswith(SUFFIXES):
        yield f"--output {options.output}: can't be written in this form. Fix: a name ending in {', '.join(SUFFIXES)}."
    for name in (options.output, options.summary, options.curves, options.curves_page):
        if name is None:
            continue
        if not Path(name).absolute().parent.is_dir():
            yield f"{name}: its folder does not exist. Fix: mkdir -p {Path(name).parent}"
        elif Path(name).exists() and not options.overwrite:
            yield f"{name}: exists. Fix: another name, or --overwrite."


def _selection_problems(options: argparse.Namespace) -> Iterator[str]:
    for option, output_format in _OPTION_OF_FORMAT.items():
        value = getattr(options, option)
        if value is not None and options.output_format != output_format:
            yield (
                f"--{option} {value}: only --output_format {output_format} reads it, and this one is "
                f"{options.output_format}. Fix: leave it out, or --output_format {output_format}."
            )
    wants_curves = options.curves is not None or options.curves_page is not None
    if not wants_curves and options.max_n is not None:
        yield f"--max_n {options.max_n}: only --curves reads it. Fix: leave it out, or --curves FILE.json."
    if not wants_curves and options.gold_column is not None:
        yield (
            f"--gold_column {options.gold_column}: only --curves reads it. Fix: --per_completion "
            f"{options.gold_column} carries it along; --curves FILE.json draws it."
        )


def _number_problems(options: argparse.Namespace) -> Iterator[str]:
    least = {
        "top_k": 1,
        "max_n": 1,
        "num_resamples": 100,
        "max_tokens_per_batch": 1,
        "min_margin": 0,
        "max_rejected_share": 0,
    }
    for option, bound in least.items():
        value = getattr(options, option)
        if value is not None and not value >= bound:
            yield f"--{option} {value}: must be at least {bound}. Fix: --{option} {bound} or more."
    if options.min_score is not None and math.isnan(options.min_score):
        yield "--min_score nan: every comparison with it fails. Fix: give a number."


def _columns(options: argparse.Namespace) -> Columns:
    from rm_scale.inference.candidates import Columns

    gold = [options.gold_column] if options.gold_column else []
    per_completion = tuple(dict.fromkeys([*options.per_completion, *gold]))
    return Columns(options.group_by, per_completion, options.score_column)


def _selection(options: argparse.Namespace) -> Selection:
    from rm_scale.inference.ranking import Selection

    given = {name: getattr(options, name) for name in _OPTION_OF_FORMAT if getattr(options, name) is not None}
    return Selection(options.output_format, ties=options.ties, seed=options.seed, **given)


def _samples(options: argparse.Namespace) -> CurveSamples | None:
    from rm_scale.inference.best_of_n import CurveSamples

    return CurveSamples() if options.curves or options.curves_page else None


# --- Scoring and choosing ------------------------------------------------------------------------------------------


def _score(groups: Iterable[CandidateGroup], options: argparse.Namespace) -> Iterator[RankedGroup]:
    from rm_scale.distributed import detect_world, prepare_environment

    world = detect_world()
    prepare_environment(world)
    from rm_scale.inference.ranking import score_groups

    device = rank_device(options, world)
    scorer = load_scorer(options.model, options, device)
    return score_groups(groups, scorer, options.max_tokens_per_batch or MAX_TOKENS[device.split(":")[0]])


def _select(
    ranked: Iterable[RankedGroup], how: Selection, report: RankReport
) -> Iterator[tuple[RankedGroup, Selected]]:
    from tqdm import tqdm

    from rm_scale.inference.ranking import select

    with tqdm(unit=" completions", desc="ranking", mininterval=1.0, disable=None) as progress:
        for group in ranked:
            selected = select(group, how)
            report.add(group, selected)
            progress.update(len(group.scores))
            yield group, selected


def _sample(samples: CurveSamples | None, group: RankedGroup, gold_column: str | None) -> None:
    if samples is None:
        return
    from rm_scale.inference.candidates import number_or_none

    gold = None
    if gold_column is not None:
        values = group.group.per_completion[gold_column]
        gold = [number_or_none(values[place]) for place in group.order]
    samples.add([group.score(place) for place in group.order], gold)


# --- Files ---------------------------------------------------------------------------------------------------------


def left_out_path(output: Path) -> Path:
    """Where the prompts and completions that were left out are listed, beside the output."""
    return output.with_name(f"{output.name}.left_out.jsonl")


def left_out_lines(ranked: RankedGroup, selected: Selected) -> Iterator[dict[str, Any]]:
    """One line per completion without a score, and one for a prompt that gave no row."""
    first = ranked.group.rows[0]
    for place, reason in enumerate(ranked.problems):
        if reason is not None:
            yield {"row": first, "place": place, "reason": reason}
    if selected.left_out is not None:
        yield {"row": first, "place": None, "reason": selected.left_out}


def _read_rows(file: RowFile) -> Iterator[tuple[int, Any]]:
    for start in range(0, len(file), _READ_ROWS):
        yield from file.read(start, start + _READ_ROWS)


class _Spool:
    """Rows on their way to a file, on disk, since Parquet and CSV must see all columns before they begin.

    Args:
        folder: where the output goes; there must be room for it anyway.
    """

    def __init__(self, folder: Path) -> None:
        # Without a name: it is gone with the process, whatever ends it.
        self.stream = tempfile.TemporaryFile(mode="w+", encoding="utf-8", dir=folder)  # noqa: SIM115
        self.starts: list[int] = []
        self.num_rows = 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        if self.num_rows % _READ_ROWS == 0:
            self.starts.append(self.stream.tell())
        self.stream.write(json.dumps(row) + "\n")
        self.num_rows += 1

    def parts(self) -> list[_SpoolPart]:
        """All rows, as `write_rows` takes them."""
        return [_SpoolPart(self, number) for number in range(len(self.starts))]


class _SpoolPart:
    """Some rows of a spool; can be gone through again and again."""

    def __init__(self, spool: _Spool, number: int) -> None:
        self.spool = spool
        self.number = number

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.spool.stream.seek(self.spool.starts[self.number])
        count = min(_READ_ROWS, self.spool.num_rows - self.number * _READ_ROWS)
        lines = [self.spool.stream.readline() for _ in range(count)]
        return (json.loads(line) for line in lines)


def _write_json(path: str, value: Any) -> None:
    aside = Path(path).with_name(f".{Path(path).name}.writing")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _write_curves(curves: BestOfN, options: argparse.Namespace) -> None:
    if options.curves:
        _write_json(options.curves, curves.to_json())
    if options.curves_page:
        from rm_scale.reporting.best_of_n_page import write_curves_page

        facts = {
            "completions": options.input,
            "scores": options.model or f"column {options.score_column}",
            "gold scores": f"column {options.gold_column}" if options.gold_column else "none",
        }
        write_curves_page(curves, Path(options.curves_page), facts)


# --- The account ---------------------------------------------------------------------------------------------------


def _require_enough(met: InputReport, report: RankReport, options: argparse.Namespace) -> None:
    """Stop before the output appears when too much of the input could not be used."""
    for what, lost, of, lines in (
        ("rows", met.refused.total(), met.num_rows, _refused_lines(met)),
        ("completions", report.unscored.total(), report.num_completions, report.unscored_lines()),
    ):
        if lost > options.max_rejected_share * of:
            raise DataError(
                f"{options.input}: {lost} of {of} {what} can't be used, and --max_rejected_share is "
                f"{options.max_rejected_share:g}; nothing was written.\n  "
                + "\n  ".join(lines)
                + "\nFix: mend them, or "
                f"accept the loss with --max_rejected_share {min(1.0, math.ceil(100 * lost / of) / 100):g}."
            )


def _refused_lines(met: InputReport) -> list[str]:
    from rm_scale.data.groups import REJECTION_REASONS

    lines = []
    for reason, count in met.refused.most_common():
        first = "; ".join(f"row {row}{': ' + detail if detail else ''}" for row, detail in met.examples[reason][:3])
        lines.append(f"rows that can't be used: {reason} {count}: {REJECTION_REASONS[reason]} ({first})")
    return lines


def _say(options: argparse.Namespace, met: InputReport, report: RankReport, curves: BestOfN | None) -> None:
    from rm_scale.inference.best_of_n import curve_table

    lines = [f"{options.output}: {met.num_rows} rows read", report.text(options.output_format), *_refused_lines(met)]
    if met.differing_columns:
        names = " ".join(sorted(met.differing_columns))
        lines.append(
            f"columns that change within a prompt were left empty: {names}. To carry them along: "
            f"--per_completion {names}"
        )
    if curves is not None:
        lines += ["", curve_table(curves)]
        _write_curves(curves, options)
    if options.summary:
        summary = {"num_rows": met.num_rows, "refused_rows": dict(met.refused), **report.to_json()}
        _write_json(options.summary, summary)
    print("\n".join(lines))
