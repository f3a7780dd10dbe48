"""Judge scores that lie in columns of files, and compare them with those of other columns, files and models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.data.data_report import NUM_FIRST_ROWS
from rm_scale.errors import DataError
from rm_scale.evaluation.evaluate import ScoredModel, metric_names
from rm_scale.evaluation.evaluated_models import EvaluatedModel, short_names
from rm_scale.evaluation.requirements import Wanted, check_names
from rm_scale.evaluation.score_columns import ColumnRequest, read_column_scores
from rm_scale.evaluation.score_columns.score_values import UnusableScores
from rm_scale.evaluation.scores_file import is_scores_file, read_scores

if TYPE_CHECKING:
    from rm_scale.evaluation.benchmarks import ScoredBenchmark
    from rm_scale.inference.scoring.contract_scorer import ContractScorer


@dataclass(frozen=True)
class ColumnJudgement:
    """What is judged, and what it is compared with.

    Attributes:
        files: preference files, or files of results, with the scores.
        columns: which columns, and how they are read.
        compare: folders of models, files that `score_lines` made, and files with such columns.
        settings: of the data, for a model that has to score its texts.
        batch_size: sequences per forward pass of such a model.
        wanted: requirements; their names are checked before a model is loaded.
    """

    files: Sequence[str]
    columns: ColumnRequest
    compare: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    wanted: Sequence[Wanted] = ()


def judge_columns(asked: ColumnJudgement, load: Callable[[Path], ContractScorer]) -> list[ScoredModel]:
    """Return the scores of every column and file, and of the models that they are compared with.

    Args:
        asked: what is judged.
        load: loads the model in a folder.

    Raises:
        ConfigError: a requirement names no number of this evaluation.
        DataError: scores can't be read, or a model can't read the texts.
    """
    own = read_column_scores(asked.files, asked.columns)
    folders = [path for path in asked.compare if Path(path).is_dir()]
    others = [part for path in asked.compare if path not in folders for part in _of_file(path, asked.columns)]
    found = _named([*own, *others], len(own), asked.files)
    names = [*(model.name for model in found), *short_names([Path(folder) for folder in folders])]
    if asked.wanted:
        subsets = {group.subset for group in found[0].groups if group.subset}
        sources = list(dict.fromkeys(group.source for group in found[0].groups if group.source))
        check_names(asked.wanted, metric_names(names, sorted(subsets), sources), ("benchmarks.",))
    return [*found, *_of_models(folders, asked, names[len(found) :], load)]


def judge_scored_benchmarks(
    files: Sequence[str], benchmark_format: str, words: Sequence[str], max_rejected_share: float
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the results of benchmarks whose files hold scores, by the scores' columns and the file's short name.

    Args:
        files: each a benchmark with scores beside its rows.
        benchmark_format: a name of `FORMATS`.
        words: which columns hold scores.
        max_rejected_share: most items whose scores may be unusable; these count as lost.

    Raises:
        DataError: a file can't be read, or too many scores are unusable.
    """
    from rm_scale.evaluation.benchmarks import read_scored_benchmark
    from rm_scale.evaluation.benchmarks.lost_items import score_with_lost

    results: dict[str, dict[str, dict[str, Any]]] = {}
    for file, short in zip(files, short_names([Path(file) for file in files]), strict=True):
        for one in read_scored_benchmark(file, benchmark_format, words):
            whose = f"have no usable scores in {one.name}"
            found = score_with_lost(one.benchmark, one.scores, max_rejected_share, short, whose, "score them again")
            results.setdefault(one.name, {})[short] = {**found, "unscored": _reasons(one)}
    return results


def _reasons(scored: ScoredBenchmark) -> dict[str, dict[str, Any]]:
    """Return how many items have no scores, by reason, with the first rows."""
    reasons: dict[str, list[int]] = {}
    for row, scores in zip(scored.rows, scored.scores, strict=True):
        if isinstance(scores, UnusableScores):
            reasons.setdefault(scores.reason, []).append(row)
    return {reason: {"count": len(rows), "first_rows": rows[:NUM_FIRST_ROWS]} for reason, rows in reasons.items()}


def _of_file(path: str, request: ColumnRequest) -> list[ScoredModel]:
    if is_scores_file(Path(path)):
        return [ScoredModel("evaluation_scores", path, read_scores(Path(path)))]
    return read_column_scores([path], request)


def _named(models: Sequence[ScoredModel], num_own: int, files: Sequence[str]) -> list[ScoredModel]:
    """Call each by its columns, by its file where others come from other files, or by both."""
    by_file = len({model.path for model in models}) > 1
    short = dict(zip([model.path for model in models], short_names(_distinct(models, files)), strict=True))
    several = {path for path in short if sum(model.path == path for model in models) > 1}
    names = []
    for number, model in enumerate(models):
        name = short[model.path] if by_file else model.name
        if by_file and (model.path in several or (number < num_own and num_own > 1)):
            name = f"{name} {model.name}"
        names.append(f"{name} ({number + 1})" if name in names else name)
    return [replace(model, name=name) for model, name in zip(models, names, strict=True)]


def _distinct(models: Sequence[ScoredModel], files: Sequence[str]) -> list[Path]:
    """Return one path for each model; several files of the first ones are called like the first of them."""
    own = ", ".join(files)
    return [Path(files[0] if model.path == own else model.path) for model in models]


def _of_models(
    folders: Sequence[str], asked: ColumnJudgement, names: Sequence[str], load: Callable[[Path], ContractScorer]
) -> list[ScoredModel]:
    if not folders:
        return []
    # Heavy, and not needed where all scores are read.
    from rm_scale.evaluation.evaluation_groups import EvaluationGroups
    from rm_scale.evaluation.score_models import ScoringRequest, score_models

    models = [EvaluatedModel(Path(folder), name) for folder, name in zip(folders, names, strict=True)]
    groups = EvaluationGroups(asked.files, None, asked.settings)
    try:
        scored, _ = score_models(ScoringRequest(models, groups, (), "auto", 0.0, asked.batch_size), load)
    except DataError as error:
        raise DataError(
            f"--compare {' '.join(folders)}: the model has to score the texts beside the scores, and {error}"
        ) from error
    return scored
