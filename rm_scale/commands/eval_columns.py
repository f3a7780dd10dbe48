"""The part of `rm-scale eval` that judges scores made elsewhere: its options, what is wrong with them, the call."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_scale.evaluation.evaluate import ScoredModel
    from rm_scale.evaluation.requirements import Wanted
    from rm_scale.evaluation.score_columns import ColumnRequest
    from rm_scale.inference.scoring.contract_scorer import ContractScorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for scores that lie in columns of the data."""
    columns = parser.add_argument_group("scores made elsewhere")
    columns.add_argument(
        "--score_column",
        nargs="*",
        metavar="NAME",
        help="judge scores in the files of --dataset_path or --benchmark, and load no model: a column with a list or a "
        "number per row, or CHOSEN,REJECTED; further ones are compared with the first; without a name: known names",
    )
    columns.add_argument(
        "--label_column", metavar="NAME", help="which response is the better one (default: known names)"
    )
    columns.add_argument("--group_column", metavar="NAME", help="of one score per row: which rows belong together")


def problems(options: argparse.Namespace) -> Iterator[str]:
    """Yield what is wrong with the options, where `--score_column` or an option for it is given."""
    given = [name for name in ("label_column", "group_column") if getattr(options, name) is not None]
    if options.score_column is None:
        if given:
            yield f"--{', --'.join(given)}: say how --score_column is read. Fix: --score_column NAME, or leave it out."
        return
    if not options.dataset_path and not options.benchmark:
        yield "--score_column: of which file is not said. Fix: --dataset_path FILE, or --benchmark FILE."
    for name in ("model", "scores"):
        if getattr(options, name):
            yield f"--{name} beside --score_column: the scores in the file are judged. Fix: --compare for the others."
    for name in options.compare:
        if not Path(name).exists():
            yield f"--compare {name}: does not exist. Fix: give a model's folder, or a file with scores."
    if options.compare and not options.dataset_path:
        yield "--compare: benchmarks are not compared pair by pair. Fix: several files, or leave it out."
    if options.model_card:
        yield "--model_card: there is no model whose card it could be. Fix: leave it out."


def score(
    options: argparse.Namespace,
    settings: Mapping[str, Any],
    max_rejected_share: float,
    wanted: Sequence[Wanted],
    load: Callable[[Path], ContractScorer],
) -> tuple[list[ScoredModel], dict[str, dict[str, dict[str, Any]]]]:
    """Return the scores of the columns, with those of what they are compared with, and their benchmarks' results.

    Args:
        options: of the command.
        settings: of the data that were given.
        max_rejected_share: most rows that may be unusable.
        wanted: requirements.
        load: loads the model in a folder.
    """
    from rm_scale.evaluation.judge_columns import ColumnJudgement, judge_columns, judge_scored_benchmarks

    request = _request(options, max_rejected_share)
    scored: list[ScoredModel] = []
    if options.dataset_path:
        ignored = [*(options.ignore_columns or []), *_columns(options.score_column)]
        data = {**settings, **({"ignore_columns": ignored} if ignored else {})}
        asked = ColumnJudgement(options.dataset_path, request, options.compare, data, options.batch_size, wanted)
        scored = judge_columns(asked, load)
    benchmarks: dict[str, dict[str, dict[str, Any]]] = {}
    if options.benchmark:
        found = judge_scored_benchmarks(
            options.benchmark, options.benchmark_format, options.score_column, max_rejected_share
        )
        # The gate looks for the benchmarks of the first model, by its name.
        benchmarks = dict(zip([scored[0].name, *list(found)[1:]], found.values(), strict=True)) if scored else found
    return scored, benchmarks


def _request(options: argparse.Namespace, max_rejected_share: float) -> ColumnRequest:
    from rm_scale.evaluation.score_columns import ColumnRequest

    return ColumnRequest(
        words=options.score_column,
        label_column=options.label_column,
        group_column=options.group_column,
        subset_column=options.subset_column or "subset",
        max_groups=options.max_samples,
        max_rejected_share=max_rejected_share,
        ignore_columns=options.ignore_columns or (),
    )


def _columns(words: Sequence[str]) -> list[str]:
    return [part.strip().partition(".")[0].partition("[")[0] for word in words for part in word.split(",")]
