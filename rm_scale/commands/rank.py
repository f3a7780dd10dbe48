"""`rm-scale rank`: best-of-N: rank completions, choose the best, make preference pairs, draw the curve over n."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.commands.endpoint_options import (
    add_endpoint_arguments,
    endpoint_problems,
    endpoint_scorer,
    open_endpoints,
)
from rm_scale.commands.scoring_options import add_scoring_arguments, load_scorer, tokens_per_batch
from rm_scale.errors import ConfigError
from rm_scale.files import write_whole
from rm_scale.logs import get_logger
from rm_scale.output_paths import file_problem
from rm_scale.texts import one_line, printable, range_rule

if TYPE_CHECKING:
    from rm_scale.inference.ranking.best_of_n import BestOfN
    from rm_scale.inference.ranking.candidates import CandidateGroup, Columns, InputReport
    from rm_scale.inference.ranking.rank_candidates import RankedGroup
    from rm_scale.inference.ranking.rank_report import RankReport
    from rm_scale.inference.ranking.selection import Selection

logger = get_logger(__name__)

HELP = "best-of-N: rank completions, make preference pairs"
EXAMPLE = "rm-scale rank --model outputs/demo --input candidates.jsonl --output best.jsonl"
DESCRIPTION = (
    "Score several completions of each prompt, each prompt computed once, and write them ranked, the best of them, or "
    "chosen/rejected pairs. Rows hold `prompt` and `completions` (a list), or `prompt` and `completion` with the rows "
    "of a prompt behind one another. See docs/best_of_n.md."
)
FORMATS = ("ranked", "top", "best", "pairs")
PAIRS = ("best_worst", "best_random", "adjacent", "all")
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
TIES = ("first", "random", "skip")
# Options that only one output format reads.
_OPTION_OF_FORMAT = {
    "top_k": "top",
    "min_score": "best",
    "pairs": "pairs",
    "min_margin": "pairs",
    "margin_column": "pairs",
}
# The smallest and the largest value that makes sense.
_RANGES = {
    "top_k": (1, 1_000_000),
    "max_n": (1, 1_000_000),
    "num_resamples": (100, 100_000),
    "max_tokens_per_batch": (1, 1_000_000_000),
    "min_margin": (0, math.inf),
    "max_rejected_share": (0, 1),
    "seed": (0, 2**32 - 1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale rank`."""
    _add_files(parser)
    _add_selection(parser)
    _add_curves(parser)
    add_scoring_arguments(parser)
    add_endpoint_arguments(parser)


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
        "--ignore_columns", nargs="+", default=[], metavar="COLUMN", help="carried along and not read, as in training"
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
    curves.add_argument(
        "--max_n", type=int, metavar="N", help="largest n (default: up to 1000, as many as most prompts have)"
    )
    curves.add_argument("--num_resamples", type=int, default=1000, help="bootstrap resamples of the prompts")


def run(options: argparse.Namespace) -> int:
    """Rank, write, and say what became of every prompt; return 0.

    Raises:
        UserError: an option makes no sense, or what reading, scoring and writing raise.
    """
    _check(options)
    from rm_scale.inference.ranking.best_of_n import CurveSamples
    from rm_scale.inference.ranking.rank_candidates import use_given_scores
    from rm_scale.inference.ranking.rank_file import rank_file

    samples = CurveSamples() if options.curves or options.curves_page else None
    met, report = rank_file(
        options.input,
        Path(options.output),
        _columns(options),
        use_given_scores if options.score_column else lambda groups: _score(groups, options),
        _selection(options),
        options.max_rejected_share,
        samples,
        options.gold_column,
    )
    curves = samples.curves(options.max_n, options.num_resamples, options.seed) if samples is not None else None
    _report(options, met, report, curves)
    return 0


# --- Options -------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    """Raise `ConfigError` with all that is wrong with the options, before anything is read."""
    problems = [*_source_problems(options), *_selection_problems(options), *_number_problems(options)]
    problems += endpoint_problems(options)
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
    yield from _output_problems(options)


def _output_problems(options: argparse.Namespace) -> Iterator[str]:
    given = [options.output, options.summary, options.curves, options.curves_page]
    # What was left out is listed beside the output.
    paths = [*(name for name in given if name is not None), f"{options.output}.left_out.jsonl"]
    read = [name for name in (options.input, options.model, options.chat_template_path) if name is not None]
    for name in paths:
        problem = file_problem(name, name, overwrite=options.overwrite, read=read)
        yield from [problem] if problem is not None else []
    places = Counter(Path(name).resolve() for name in paths)
    for place in (place for place, count in places.items() if count > 1):
        yield f"{place}: two results would be written to it. Fix: another name for one of them."


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
    for option, (least, most) in _RANGES.items():
        value = getattr(options, option)
        rule = range_rule(f"--{option}", value, least, most)
        yield from [f"--{option} {one_line(value, 40)}: {rule}"] if rule is not None else []
    if options.min_score is not None and math.isnan(options.min_score):
        yield "--min_score nan: every comparison with it fails. Fix: give a number."


def _columns(options: argparse.Namespace) -> Columns:
    from rm_scale.inference.ranking.candidates import Columns

    gold = [options.gold_column] if options.gold_column else []
    per_completion = tuple(dict.fromkeys([*options.per_completion, *gold]))
    return Columns(options.group_by, per_completion, options.score_column, tuple(options.ignore_columns))


def _selection(options: argparse.Namespace) -> Selection:
    from rm_scale.inference.ranking.selection import Selection

    given = {name: getattr(options, name) for name in _OPTION_OF_FORMAT if getattr(options, name) is not None}
    return Selection(options.output_format, ties=options.ties, seed=options.seed, **given)


def _score(groups: Iterable[CandidateGroup], options: argparse.Namespace) -> Iterator[RankedGroup]:
    from rm_scale.distributed import detect_world, prepare_environment

    world = detect_world()
    prepare_environment(world)
    from rm_scale.inference.ranking.rank_candidates import score_groups
    from rm_scale.launch.devices import rank_device

    if options.endpoint is not None:
        (endpoint,) = open_endpoints(options)
        return score_groups(groups, endpoint_scorer(options.model, endpoint, options))
    device = rank_device(options.device, world)
    return score_groups(groups, load_scorer(options.model, options, device), tokens_per_batch(options, device))


# --- Summary and curves ----------------------------------------------------------------------------------------------


def _write_json(path: str, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_curves(curves: BestOfN, options: argparse.Namespace) -> None:
    if options.curves:
        _write_json(options.curves, curves.to_json())
    if options.curves_page:
        from rm_scale.reporting.evaluation.best_of_n_page import write_curves_page

        facts = {
            "completions": options.input,
            "scores": options.model or f"column {options.score_column}",
            "gold scores": f"column {options.gold_column}" if options.gold_column else "none",
        }
        write_curves_page(curves, Path(options.curves_page), facts)


def _report(options: argparse.Namespace, met: InputReport, report: RankReport, curves: BestOfN | None) -> None:
    from rm_scale.inference.ranking.best_of_n import curve_table
    from rm_scale.inference.ranking.rank_file import refused_row_lines

    lines = [f"{options.output}: {met.num_rows} rows read", report.text(options.output_format), *refused_row_lines(met)]
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
    print(printable("\n".join(lines)))
