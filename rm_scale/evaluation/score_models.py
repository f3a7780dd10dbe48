"""Score all models of an evaluation on its groups and benchmarks, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rm_scale.data.preparation import EvaluationData
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.evaluation.benchmarks import Benchmark, read_benchmark
from rm_scale.evaluation.evaluate import ScoredModel, metric_names
from rm_scale.evaluation.evaluated_models import EvaluatedModel, short_names
from rm_scale.evaluation.evaluation_groups import EvaluationGroups
from rm_scale.evaluation.requirements import Wanted, check_names
from rm_scale.evaluation.scored_groups import data_use, require_few_lost, score_benchmark, score_groups
from rm_scale.evaluation.scores_file import read_scores
from rm_scale.inference.scoring.contract_scorer import ContractScorer

BenchmarkResults = dict[str, dict[str, dict[str, Any]]]
"""A benchmark's numbers by the model's name and the benchmark's."""


@dataclass(frozen=True)
class ScoringRequest:
    """What is scored, and how.

    Attributes:
        models: the first is judged, the others it is compared with.
        groups: preference groups; `None` with benchmarks alone.
        benchmark_files: files of public benchmarks.
        benchmark_format: a name that `read_benchmark` knows, or "auto".
        max_rejected_share: most items of a benchmark that a model may be unable to score.
        batch_size: sequences per forward pass.
        wanted: requirements; their names are checked before any model is loaded.
    """

    models: Sequence[EvaluatedModel]
    groups: EvaluationGroups | None
    benchmark_files: Sequence[str]
    benchmark_format: str
    max_rejected_share: float
    batch_size: int
    wanted: Sequence[Wanted] = ()


def score_models(
    request: ScoringRequest, load: Callable[[Path], ContractScorer]
) -> tuple[list[ScoredModel], BenchmarkResults]:
    """Return every model's rewards on the groups, and its results on the benchmarks.

    Args:
        request: what is scored.
        load: loads the model in a folder.

    Raises:
        ConfigError: a requirement names no number of this evaluation.
        DataError: data, scores or a benchmark can't be used.
    """
    names = [model.name for model in request.models] if request.groups is not None else []
    _check_names_early(request.wanted, names, later=("subsets.", "sources.", "benchmarks."))
    benchmarks = read_benchmarks(request.benchmark_files, request.benchmark_format)
    scored: list[ScoredModel] = []
    results: BenchmarkResults = {}
    for model in request.models:
        if not model.is_model:
            scored.append(ScoredModel(model.name, str(model.path), read_scores(model.path)))
            continue
        scorer = load(model.path)
        if request.groups is not None:
            data = request.groups.for_scorer(scorer)
            if not scored:
                subsets = sorted({subset for subset in data.groups["subset"] if subset})
                _check_names_early(request.wanted, names, ("benchmarks.",), subsets, data.origins.names)
            scored.append(_score_model(model, scorer, data, request.groups, request.batch_size))
        if benchmarks:
            results[model.name] = _score_benchmarks(benchmarks, scorer, request)
        del scorer
    return scored, results


def _check_names_early(
    wanted: Sequence[Wanted],
    names: Sequence[str],
    later: Sequence[str],
    subsets: Sequence[str] = (),
    sources: Sequence[str] = (),
) -> None:
    """Refuse a misspelt metric before any time is spent on scoring; names that begin with `later` are not known yet."""
    if wanted:
        check_names(wanted, metric_names(names, subsets, sources), later)


def _score_model(
    model: EvaluatedModel, scorer: ContractScorer, data: EvaluationData, groups: EvaluationGroups, batch_size: int
) -> ScoredModel:
    rewards = score_groups(data, scorer, batch_size)
    tried = list(tqdm(rewards, total=len(data.groups), unit=" groups", desc=model.name, mininterval=1.0, disable=None))
    found = [one for one in tried if not isinstance(one, RejectedRow)]
    lost = {place: one for place, one in enumerate(tried) if isinstance(one, RejectedRow)}
    require_few_lost(data, lost, groups.config.max_rejected_share, model.name)
    settings, keep_ties = groups.loss_settings()
    facts = {"dtype": scorer.dtype, "device": str(scorer.device), "max_length": scorer.encoder.rules.max_length}
    return ScoredModel(model.name, str(model.path), found, settings, keep_ties, facts, data_use(data, lost))


def read_benchmarks(files: Sequence[str], benchmark_format: str) -> dict[str, Benchmark]:
    """Read benchmark files; return them under their `short_names`."""
    names = short_names([Path(file) for file in files])
    return {name: read_benchmark(file, benchmark_format) for name, file in zip(names, files, strict=True)}


def _score_benchmarks(
    benchmarks: Mapping[str, Benchmark], scorer: ContractScorer, request: ScoringRequest
) -> dict[str, dict[str, Any]]:
    return {
        name: score_benchmark(benchmark, scorer, request.batch_size, request.max_rejected_share, name)
        for name, benchmark in benchmarks.items()
    }
