"""Prepare the data of a run: from `RunConfig` to encoded training and evaluation sets, with a report on every row.

Each source is read, checked and encoded once and then found in the cache (`rm_scale.data.cache`). Splitting and limits
come after that and are cheap (`rm_scale.data.splits`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rm_scale.config import RunConfig
from rm_scale.data.cache import RejectedRows, load_or_encode
from rm_scale.data.data_report import (
    DataReport,
    IntArray,
    SourceReport,
    log_summary,
)
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.reading import Reading
from rm_scale.data.sources import Source, hub_source, local_sources
from rm_scale.data.splits import GroupSizes, Origins, hold_out, join_sources
from rm_scale.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class EvaluationData:
    """Encoded groups to evaluate on.

    Attributes:
        groups: columns as in `PreparedData`.
        origins: where each group comes from.
        sources: what became of the rows, per source.
        rejected: {"source", "row", "reason", "detail"} per rejected row.
    """

    groups: Dataset
    origins: Origins
    sources: tuple[SourceReport, ...]
    rejected: RejectedRows


@dataclass(frozen=True)
class PreparedData:
    """Encoded data, the report on it, and the rows that were rejected.

    Attributes:
        train, eval: columns `input_ids` (K lists of token ids), `prompt_length`, `ranks` (K), `margin`, `soft_label`
            (both null when not given), `subset`, `id`, `row` (index in its source), `num_tokens` (of all K sequences).
            Memory-mapped and in the order of the sources. `eval` is `None` when nothing was asked for.
        report: counts and statistics.
        rejected: {"source", "row", "reason", "detail"} per rejected row; read from the cache when iterated over.
        train_sizes: sizes of the training groups, in their order.
        eval_origins: where the evaluation groups come from; `None` without evaluation data.
    """

    train: Dataset
    eval: Dataset | None
    report: DataReport
    rejected: RejectedRows
    train_sizes: GroupSizes
    eval_origins: Origins | None = None


def prepare_data(config: RunConfig, encoder: TextEncoder) -> PreparedData:
    """Read, check, encode and split the data of a run; a second call finds everything in the cache.

    The share of rejected rows is not judged here: write the report first (`write_data_report`), then call
    `raise_if_too_many(prepared.report, config.max_rejected_share)`.

    Raises:
        DataError: a source can't be read or fits no format, nothing usable is left, or the split is impossible.
        ModelError: conversations without a chat template.
    """
    train_sources, eval_sources = find_sources(config)
    train_parts = [load_or_encode(source, "train", config, encoder) for source in train_sources]
    eval_parts = [load_or_encode(source, "eval", config, encoder) for source in eval_sources]
    train = join_sources(train_parts)
    evaluation = join_sources(eval_parts) if eval_parts else None
    held_out = 0
    if config.eval_split_size is not None:
        train, evaluation = hold_out(train, config.eval_split_size, _seed(config))
        held_out = len(evaluation)
    usable = len(train) + (len(evaluation) if evaluation else 0)
    train = train.limit(config.max_train_samples)
    evaluation = evaluation.limit(config.max_eval_samples) if evaluation else None
    parts = train_parts + eval_parts
    report = DataReport(
        sources=tuple(part.report for part in parts),
        train=train.statistics(),
        eval=evaluation.statistics() if evaluation else None,
        held_out=held_out,
        left_out_by_limit=usable - len(train) - (len(evaluation) if evaluation else 0),
        shared_prompts=len(np.intersect1d(train.prompts, evaluation.prompts)) if evaluation else 0,
    )
    log_summary(report)
    rejected = RejectedRows([(part.rejected_path, part.report.name, part.report.rows_rejected) for part in parts])
    evaluation_set = evaluation.dataset if evaluation else None
    eval_origins = evaluation.origins() if evaluation else None
    return PreparedData(train.dataset, evaluation_set, report, rejected, train.group_sizes(), eval_origins)


def prepare_evaluation(config: RunConfig, encoder: TextEncoder, only: IntArray | None = None) -> EvaluationData:
    """Read, check and encode data to evaluate on, cached as in `prepare_data`.

    Args:
        config: names the evaluation data to read; where it names none, all of its training data is read.
        encoder: how text becomes tokens.
        only: `Origins.content` of the groups wanted; by default the first `max_eval_samples`.

    Raises:
        DataError: a file can't be read or fits no format, or nothing usable is left.
        ModelError: conversations without a chat template.
    """
    if config.eval_dataset_path:
        reading = Reading.of_config(config)
        found = local_sources(config.eval_dataset_path, config.dataset_test_split or "test")
        sources = [replace(source, reading=reading) for source in found]
    else:
        train, evaluation = find_sources(config)
        sources = evaluation or train
    parts = [load_or_encode(source, "eval", config, encoder) for source in sources]
    data = join_sources(parts)
    if only is None:
        data = data.limit(config.max_eval_samples)
    else:
        data = data.take(np.flatnonzero(np.isin(data.groups, only)))
    rejected = RejectedRows([(part.rejected_path, part.report.name, part.report.rows_rejected) for part in parts])
    return EvaluationData(data.dataset, data.origins(), tuple(part.report for part in parts), rejected)


def prepare_held_out(config: RunConfig, encoder: TextEncoder) -> EvaluationData:
    """Return the evaluation groups of a run, as its training had them.

    Raises:
        DataError: the run had none; otherwise as `prepare_data`.
    """
    if config.eval_dataset_path:
        return prepare_evaluation(config, encoder)  # which does not depend on the training data
    data = prepare_data(config, encoder)
    if data.eval is None or data.eval_origins is None:
        raise DataError("the run has no evaluation data of its own. Fix: --dataset_path FILE.")
    splits = {report.split for report in data.report.sources}
    used = tuple(report for report in data.report.sources if report.split == "eval" or "eval" not in splits)
    return EvaluationData(data.eval, data.eval_origins, used, data.rejected)


def find_sources(config: RunConfig) -> tuple[list[Source], list[Source]]:
    """Return the sources to train on and to evaluate on.

    Raises:
        DataError: none is given, or one does not exist.
    """
    evaluation: list[Source] = []
    if config.dataset_name:
        train = [hub_source(config.dataset_name, config.dataset_config, config.dataset_train_split)]
        if config.dataset_test_split:
            evaluation = [hub_source(config.dataset_name, config.dataset_config, config.dataset_test_split)]
    else:
        train = local_sources(config.dataset_path or [], config.dataset_train_split)
    if config.eval_dataset_path:
        evaluation = local_sources(config.eval_dataset_path, config.dataset_test_split or "test")
    reading = Reading.of_config(config)
    train = [replace(source, reading=reading) for source in train]
    evaluation = [replace(source, reading=reading) for source in evaluation]
    if not train:
        raise DataError("dataset_path and dataset_name: neither is given. Fix: --dataset_path FILE.")
    return train, evaluation


def _seed(config: RunConfig) -> int:
    return config.seed if config.data_seed is None else config.data_seed
