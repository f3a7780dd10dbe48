"""Prepare the data of a run: from `RunConfig` to encoded training and evaluation sets, with a report on every row.

Each source is read, checked and encoded once and then found in the cache (`rm_scale.data.cache`). Splitting and limits
come after that and are cheap (`rm_scale.data.splits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rm_scale.config import RunConfig
from rm_scale.config_sources import sources_in
from rm_scale.data.cache import EncodedSource, RejectedRows, load_or_encode
from rm_scale.data.data_report import (
    DataReport,
    IntArray,
    SourceReport,
    log_summary,
)
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.hub_sources import HubSplit, hub_record, hub_source
from rm_scale.data.mixture import Mixture, first_of_each
from rm_scale.data.reading import Reading
from rm_scale.data.source_list import listed_sources
from rm_scale.data.source_shares import by_entry, hold_out_of_each, mixture_of, source_shares
from rm_scale.data.sources import Source, local_sources
from rm_scale.data.splits import GroupSet, GroupSizes, Origins, hold_out, join_sources
from rm_scale.data.streamed_sources import StreamedSources, open_streams
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
        mixture: the shares of the sources in what is trained on; `None` without a list of sources.
        stream: where training rows come from while training goes on. `train` and its sizes are then those of the first
            rows alone. `None` where everything has been encoded.
    """

    train: Dataset
    eval: Dataset | None
    report: DataReport
    rejected: RejectedRows
    train_sizes: GroupSizes
    eval_origins: Origins | None = None
    mixture: Mixture | None = None
    stream: StreamedSources | None = None


def prepare_data(config: RunConfig, encoder: TextEncoder) -> PreparedData:
    """Read, check, encode and split the data of a run; a second call finds everything in the cache.

    The share of rejected rows is not judged here: write the report first (`write_data_report`), then call
    `raise_if_too_many(prepared.report, config.max_rejected_share)`.

    Raises:
        DataError: a source can't be read or fits no format, nothing usable is left, or the split is impossible.
        ModelError: conversations without a chat template.
    """
    train_sources, eval_sources = find_sources(config)
    stream = open_streams(config, train_sources, encoder) if config.streaming else None
    if stream is not None:
        train_parts = list(stream.previews)
    else:
        train_parts = [load_or_encode(source, "train", config, encoder) for source in train_sources]
    eval_parts = [load_or_encode(source, "eval", config, encoder) for source in eval_sources]
    train = _joined(config, "datasets", train_sources, train_parts)
    evaluation = _joined(config, "eval_datasets", eval_sources, eval_parts) if eval_parts else None
    held_out = 0
    if config.eval_split_size is not None:
        hold = hold_out_of_each if config.datasets else hold_out
        train, evaluation = hold(train, config.eval_split_size, _seed(config))
        held_out = len(evaluation)
    parts = train_parts + eval_parts
    usable = sum(part.report.rows_used for part in parts)
    train = _limited(train, config.max_train_samples, bool(config.datasets))
    if evaluation is not None:
        listed = bool(config.eval_datasets or (config.datasets and held_out))
        evaluation = _limited(evaluation, config.max_eval_samples, listed)
    mixture = mixture_of(config, train)
    sources = train_sources + eval_sources
    report = DataReport(
        sources=tuple(part.report for part in parts),
        train=train.statistics(),
        eval=evaluation.statistics() if evaluation else None,
        held_out=held_out,
        left_out_by_limit=usable - len(train) - (len(evaluation) if evaluation else 0),
        **(_shared(train, evaluation) if evaluation else {}),
        mixture=source_shares(config, sources, parts, train, evaluation, mixture),
        hub=tuple(hub_record(sources)),
        is_stream=stream is not None,
    )
    log_summary(report)
    recorded = eval_parts if stream is not None else parts
    rejected = RejectedRows([(part.rejected_path, part.report.name, part.report.rows_rejected) for part in recorded])
    evaluation_set = evaluation.dataset if evaluation else None
    eval_origins = evaluation.origins() if evaluation else None
    sizes = train.group_sizes()
    return PreparedData(train.dataset, evaluation_set, report, rejected, sizes, eval_origins, mixture, stream)


def _shared(train: GroupSet, evaluation: GroupSet) -> dict[str, int]:
    """Return what of the evaluation data is in the training data, for the report."""
    same_prompt = np.isin(evaluation.prompts, train.prompts)
    plain = np.isin(evaluation.plain_prompts, train.plain_prompts)
    return {
        "shared_prompts": len(np.unique(evaluation.prompts[same_prompt])),
        "shared_groups": int(np.isin(evaluation.groups, train.groups).sum()),
        "nearly_shared_prompts": int((plain & ~same_prompt).sum()),
    }


def _joined(config: RunConfig, setting: str, sources: Sequence[Source], parts: Sequence[EncodedSource]) -> GroupSet:
    """Join sources, by the names that a list gives them and with its limits, where there is one."""
    data = join_sources(parts)
    return by_entry(data, sources, sources_in(config, setting)) if getattr(config, setting) else data


def _limited(data: GroupSet, count: int | None, listed: bool) -> GroupSet:
    if not listed or count is None or count >= len(data):
        return data.limit(count)
    return data.take(first_of_each(data.sources, count, len(data.source_names)))


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
    if config.eval_datasets:
        sources = listed_sources(config, "eval_datasets")
    elif config.eval_dataset_path:
        reading = Reading.of_config(config)
        found = local_sources(config.eval_dataset_path, config.dataset_test_split or "test")
        sources = [replace(source, reading=reading) for source in found]
    else:
        train, evaluation = find_sources(config.model_copy(update={"streaming": False}))
        sources = evaluation or train
    parts = [load_or_encode(source, "eval", config, encoder) for source in sources]
    data = _joined(config, "eval_datasets", sources, parts)
    if only is None:
        data = _limited(data, config.max_eval_samples, bool(config.eval_datasets))
    else:
        data = data.take(np.flatnonzero(np.isin(data.groups, only)))
    rejected = RejectedRows([(part.rejected_path, part.report.name, part.report.rows_rejected) for part in parts])
    return EvaluationData(data.dataset, data.origins(), tuple(part.report for part in parts), rejected)


def prepare_held_out(config: RunConfig, encoder: TextEncoder) -> EvaluationData:
    """Return the evaluation groups of a run, as its training had them.

    Raises:
        DataError: the run had none; otherwise as `prepare_data`.
    """
    if config.eval_dataset_path or config.eval_datasets:
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
        asked = HubSplit(
            config.dataset_name, config.dataset_config, config.dataset_train_split, config.dataset_revision
        )
        train = [hub_source(asked, config.streaming)]
        if config.dataset_test_split:
            evaluation = [hub_source(replace(asked, split=config.dataset_test_split))]
    else:
        train = local_sources(config.dataset_path or [], config.dataset_train_split)
    if config.eval_dataset_path:
        evaluation = local_sources(config.eval_dataset_path, config.dataset_test_split or "test")
    reading = Reading.of_config(config)
    train = [replace(source, reading=reading) for source in train]
    evaluation = [replace(source, reading=reading) for source in evaluation]
    if config.datasets:
        train = listed_sources(config, "datasets")
    if config.eval_datasets:
        evaluation = listed_sources(config, "eval_datasets")
    if not train:
        raise DataError("dataset_path, dataset_name and datasets: none is given. Fix: --dataset_path FILE.")
    return train, evaluation


def _seed(config: RunConfig) -> int:
    return config.seed if config.data_seed is None else config.data_seed
