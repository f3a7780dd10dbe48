"""Compute all numbers of an evaluation, from the scored groups of one or several models to `EvaluationDocument`."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, cast

import numpy as np

from rm_scale.errors import ModelError
from rm_scale.evaluation.calibration import calibration
from rm_scale.evaluation.evaluation_document import (
    DOCUMENT_VERSION,
    Agreement,
    Comparison,
    DataUse,
    EvaluationDocument,
    Margins,
    ModelEvaluation,
    Ratios,
    Slice,
    Ties,
)
from rm_scale.evaluation.length_bias import length_bias
from rm_scale.evaluation.model_comparison import Matched, agreement, compare, match
from rm_scale.evaluation.requirements import metrics_of
from rm_scale.evaluation.resampling import DEFAULT_RESAMPLES, accuracy_interval, mean, number, ranks_of
from rm_scale.evaluation.scored_pairs import Floats, Mask, Pairs, pairs_of
from rm_scale.training.losses import LossSettings
from rm_scale.training.pair_counts import PairCounts, ScoredGroup, evaluate_groups
from rm_scale.version import __version__

_MOST_BINS = 60
_QUANTILES = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
# What programs read at the top of a run's evaluation.json.
_RECORD_KEYS = ("accuracy", "accuracy_ci95", "num_pairs", "num_ties", "loss", "mean_margin")


@dataclass(frozen=True)
class ScoredModel:
    """A model with its rewards.

    Attributes:
        name, path: see `ModelEvaluation`.
        groups: scored groups, in the data's order.
        loss_settings: which loss to report.
        keep_ties: tied labels count in the loss.
        facts: dtype, device and max_length; empty when scores were read.
        data: what became of the input rows.
    """

    name: str
    path: str
    groups: Sequence[ScoredGroup]
    loss_settings: LossSettings = field(default_factory=LossSettings)
    keep_ties: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)
    data: DataUse | None = None


@dataclass(frozen=True)
class Resampling:
    """Of every bootstrap: how many resamples, and the seed of all chance."""

    num_resamples: int = DEFAULT_RESAMPLES
    seed: int = 0


# --- One model -----------------------------------------------------------------------------------------------------


def evaluate_model(scored: ScoredModel, how: Resampling | None = None) -> ModelEvaluation:
    """Return all results of one model: overall, per subset, per source.

    Raises:
        ModelError: a reward is not finite.
    """
    how = how or Resampling()
    _require_finite(scored)
    counted = evaluate_groups(scored.groups, scored.loss_settings, scored.keep_ties)
    pairs = pairs_of(scored.groups)
    score_std = number(counted.score_std)

    def part(counts: PairCounts, chosen: Mask) -> Slice:
        return _slice(counts, pairs.of_groups(chosen), chosen, score_std, how)

    subsets, sources = (np.asarray([getattr(g, n) for g in scored.groups]) for n in ("subset", "source"))
    return ModelEvaluation(
        name=scored.name,
        path=scored.path,
        dtype=scored.facts.get("dtype"),
        device=scored.facts.get("device"),
        max_length=scored.facts.get("max_length"),
        loss_type=_loss_text(scored.loss_settings),
        **part(counted.overall, np.ones(len(scored.groups), dtype=bool)),
        score_mean=number(counted.score_mean),
        score_std=score_std,
        num_scored=counted.num_scored,
        baselines=counted.as_dict()["baselines"],
        data=scored.data,
        scores_file=None,
        subsets={name: part(counts, subsets == name) for name, counts in sorted(counted.subsets.items())},
        sources={name: part(counts, sources == name) for name, counts in sorted(counted.sources.items())},
    )


def _require_finite(scored: ScoredModel) -> None:
    bad = [group for group in scored.groups if not all(math.isfinite(reward) for reward in group.rewards)]
    if bad:
        raise ModelError(
            f"{scored.path}: {len(bad)} of {len(scored.groups)} groups have rewards that are not finite numbers, the "
            f"first is {bad[0].id or 'without id'}: {list(bad[0].rewards)}. Nothing can be said about this model. "
            "Fix: score in float32 (--dtype float32); if that changes nothing, its weights are damaged."
        )


def _loss_text(settings: LossSettings) -> str:
    options = [f"label_smoothing={settings.label_smoothing:g}"] if settings.label_smoothing else []
    return " ".join([settings.kind, *options])


def _slice(counts: PairCounts, pairs: Pairs, chosen: Mask, score_std: float | None, how: Resampling) -> Slice:
    return Slice(
        **cast("Ratios", counts.as_dict()),
        num_groups=int(chosen.sum()),
        num_prompts=len(np.unique(pairs.prompt[chosen])),
        accuracy_ci95_prompts=accuracy_interval(pairs.credit, pairs.cluster),
        margins=margins(pairs.margin),
        calibration=calibration(pairs, how.seed),
        length_bias=length_bias(pairs, score_std),
        ties=ties(pairs),
    )


def margins(values: Floats) -> Margins:
    """Return histogram and quantiles of margins."""
    if not len(values):
        empty: dict[str, float | None] = dict.fromkeys(_QUANTILES)
        return Margins(edges=[], counts=[], quantiles=empty, mean=None, std=None, min=None, max=None)
    edges = histogram_edges(values)
    counts, _ = np.histogram(values, edges)
    average = mean(values)
    assert average is not None
    return Margins(
        edges=[float(edge) for edge in edges],
        counts=[int(count) for count in counts],
        quantiles={name: float(np.quantile(values, q)) for name, q in _QUANTILES.items()},
        mean=average,
        std=math.sqrt(math.fsum((values - average) ** 2) / len(values)),
        min=float(values.min()),
        max=float(values.max()),
    )


def histogram_edges(values: Floats) -> Floats:
    """Return edges of bins of equal, round width (Freedman and Diaconis 1981), one at 0: right is right of it."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    spread = high - low
    if spread == 0:
        return np.asarray([-0.5, 0.0, 0.5])
    quartiles = np.quantile(values, [0.25, 0.75])
    wanted = 2 * float(quartiles[1] - quartiles[0]) / len(values) ** (1 / 3)
    width = _round_width(max(wanted, spread / _MOST_BINS))
    first, last = math.floor(low / width), math.floor(high / width) + 1
    edges: Floats = width * np.arange(first, last + 1, dtype=np.float64)
    return edges


def _round_width(width: float) -> float:
    """Return the next number up that is 1, 2, 2.5 or 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= width * (1 - 1e-9))


def ties(pairs: Pairs) -> Ties:
    """Return what ties there are, and whether rewards see those of the labels."""
    distances = np.abs(pairs.margin)
    exact = int((pairs.margin == 0).sum())
    return Ties(
        num_label_ties=len(pairs.tie_margin),
        label_tie_mean_abs_margin=mean(pairs.tie_margin),
        pair_mean_abs_margin=mean(distances),
        label_tie_auc=_smaller_share(pairs.tie_margin, distances),
        num_reward_ties=exact,
        reward_tie_share=exact / len(pairs) if len(pairs) else None,
    )


def _smaller_share(small: Floats, large: Floats) -> float | None:
    """Return the probability that one of `small` is below one of `large`, ties half (Mann and Whitney 1947)."""
    if not len(small) or not len(large):
        return None
    ranks = ranks_of(np.concatenate([small, large])) + 1
    above = ranks[len(small) :].sum() - len(large) * (len(large) + 1) / 2
    return float(above / (len(small) * len(large)))


# --- Several models ------------------------------------------------------------------------------------------------


def evaluate_all(
    scored: Sequence[ScoredModel],
    how: Resampling | None = None,
    benchmarks: dict[str, dict[str, dict[str, Any]]] | None = None,
) -> EvaluationDocument:
    """Return the whole document, but for the requirements (`gate`).

    Args:
        scored: the models; the first one is judged, the others are what it is compared with.
        how: of the bootstrap.
        benchmarks: results per model and benchmark.

    Raises:
        ModelError: a reward is not finite.
        DataError: two models have no group in common.
    """
    how = how or Resampling()
    models = [evaluate_model(one, how) for one in scored]
    agreements, comparisons = _between(scored, how)
    document = EvaluationDocument(
        version=DOCUMENT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={
            "rm_scale": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        models=models,
        agreement=agreements,
        comparisons=comparisons,
        benchmarks=benchmarks or {},
        gate=None,
    )
    return {**_record(models[0]), **document} if models else document  # type: ignore[typeddict-item]


def _between(scored: Sequence[ScoredModel], how: Resampling) -> tuple[list[Agreement], list[Comparison]]:
    agreements, comparisons = [], []
    for first, second in combinations(range(len(scored)), 2):
        names = (scored[first].name, scored[second].name)
        matched: Matched = match(scored[first].groups, scored[second].groups, names)
        agreements.append(agreement(matched, *names))
        if first == 0:
            comparisons.append(compare(matched, *names, how.num_resamples, how.seed))
    return agreements, comparisons


def _record(model: ModelEvaluation) -> dict[str, Any]:
    """Return the keys that a run's own evaluation.json has."""
    values: dict[str, Any] = dict(model)
    record = {key: values[key] for key in _RECORD_KEYS}
    record["subsets"] = {
        name: {key: part[key] for key in _RECORD_KEYS}  # type: ignore[literal-required]
        for name, part in model["subsets"].items()
    }
    return {**record, **{key: values[key] for key in ("score_mean", "score_std", "num_scored", "baselines")}}


def metric_names(models: Sequence[str], subsets: Iterable[str] = (), sources: Iterable[str] = ()) -> list[str]:
    """Return the names that `gate_metrics` will have for such models and data, before anything is scored.

    Args:
        models: names; without any there are only benchmarks.
        subsets, sources: names of those in the data.
    """
    places = [*((name, "") for name in subsets), *(("", name) for name in sources), ("", "")]
    groups = [ScoredGroup([0.0, 0.0], [0, 1], subset=subset, source=source) for subset, source in places]
    return list(gate_metrics(evaluate_all([ScoredModel(name, name, groups) for name in models], Resampling(1))))


def gate_metrics(document: EvaluationDocument) -> dict[str, float | None]:
    """Return the numbers a requirement may name: the first model's, its comparisons, its benchmarks.

    `comparison.METRIC` is the comparison with the second model, `comparison.NAME.METRIC` that with model NAME.
    """
    judged: dict[str, Any] = dict(document["models"][0]) if document["models"] else {}
    name = judged.get("name") or next(iter(document["benchmarks"]), "")
    comparisons = document["comparisons"]
    return metrics_of(
        {
            **judged,
            "comparison": {
                **{one["second"]: one for one in comparisons},
                **(comparisons[0] if comparisons else {}),
            },
            "benchmarks": document["benchmarks"].get(name, {}),
        }
    )
