"""The groups of a run by the sources that its lists name: limits, what is held out of each, and shares."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rm_scale.config import RunConfig
from rm_scale.config_sources import SourceSettings, sources_in
from rm_scale.data.cache import EncodedSource
from rm_scale.data.data_report import SourceShare
from rm_scale.data.mixture import Mixture, divide, first_groups, repeated, weighted
from rm_scale.data.sources import Source
from rm_scale.data.splits import GroupSet, draw_prompts, num_held_out
from rm_scale.errors import DataError


def by_entry(data: GroupSet, sources: Sequence[Source], entries: Sequence[SourceSettings]) -> GroupSet:
    """Return groups that know the entry of a list that they come from, each entry cut to its `max_samples`.

    Args:
        data: groups of files, in the order of the files.
        sources: the files.
        entries: of the list.
    """
    names = [entry.name for entry in entries]
    entry_of_file = np.array([names.index(source.member) for source in sources], dtype=np.int32)
    data = replace(data, sources=entry_of_file[data.sources], source_names=tuple(names))
    limits = [entry.max_samples for entry in entries]
    if all(limit is None for limit in limits):
        return data
    kept = first_groups(data.sources, limits)
    return data if len(kept) == len(data) else data.take(kept)


def mixture_of(config: RunConfig, train: GroupSet) -> Mixture | None:
    """Return the shares of the sources of `datasets` in what is trained on; `None` without such a list.

    Raises:
        DataError: a source has no group left.
    """
    entries = sources_in(config, "datasets")
    if not entries:
        return None
    per_step = config.mixture_shares == "per_step"
    weights = [entry.weight for entry in entries if entry.weight is not None]
    if weights:
        return weighted(train.source_names, train.sources, weights, per_step)
    epochs = [1.0 if entry.epochs is None else entry.epochs for entry in entries]
    return repeated(train.source_names, train.sources, epochs, per_step)


def hold_out_of_each(data: GroupSet, size: float, seed: int) -> tuple[GroupSet, GroupSet]:
    """Split off evaluation groups of each source in proportion; groups of one prompt stay on one side.

    A prompt of several sources counts where it comes first. What is drawn from a source depends on the seed and on its
    own prompts and name, not on the other sources.

    Args:
        data: groups of a list of sources.
        size: `eval_split_size`: a number of groups (>= 1) or a share (< 1).
        seed: seed of the draws.

    Returns:
        What is left to train on, and what is held out.

    Raises:
        DataError: one side would be empty.
    """
    wanted = num_held_out(len(data), size, "eval_datasets")
    _, first, prompt_of, sizes = np.unique(data.prompts, return_index=True, return_inverse=True, return_counts=True)
    home = data.sources[first]
    held_prompts = np.zeros(len(sizes), dtype=bool)
    counts = np.bincount(data.sources, minlength=len(data.source_names)).tolist()
    for number, part in enumerate(divide(wanted, counts)):
        prompts = np.flatnonzero(home == number)
        name_seed = zlib.crc32(data.source_names[number].encode())
        held_prompts[prompts] = draw_prompts(sizes[prompts], part, (seed, name_seed))
    held = held_prompts[prompt_of.reshape(-1)]
    if not held.any() or held.all():
        raise DataError(
            f"eval_split_size={size:g}: groups of one prompt stay together, so that none is held out, or all. Fix: "
            "choose another size, or give eval_datasets."
        )
    return data.take(np.flatnonzero(~held)), data.take(np.flatnonzero(held))


def source_shares(
    config: RunConfig,
    sources: Sequence[Source],
    parts: Sequence[EncodedSource],
    train: GroupSet,
    evaluation: GroupSet | None,
    mixture: Mixture | None,
) -> tuple[SourceShare, ...]:
    """Return what became of each entry of the lists of sources; nothing without such lists.

    Args:
        config: the run's settings.
        sources: files and hub data sets, those to train on first.
        parts: what became of each of them.
        train, evaluation: the groups that are left.
        mixture: of the training groups.
    """
    found = []
    held_out = config.eval_split_size is not None
    if mixture is not None:
        held = evaluation if held_out else None
        found += [
            _share(entry, "train", sources, parts, train, held, mixture) for entry in sources_in(config, "datasets")
        ]
    if evaluation is not None and config.eval_datasets:
        found += [
            _share(entry, "eval", sources, parts, evaluation, None, None)
            for entry in sources_in(config, "eval_datasets")
        ]
    return tuple(found)


def _share(
    entry: SourceSettings,
    split: str,
    sources: Sequence[Source],
    parts: Sequence[EncodedSource],
    data: GroupSet,
    held: GroupSet | None,
    mixture: Mixture | None,
) -> SourceShare:
    own = zip(sources, parts, strict=True)
    reports = [part.report for source, part in own if source.member == entry.name and part.report.split == split]
    number = data.source_names.index(entry.name)
    groups = int((data.sources == number).sum())
    counts = mixture.counts if mixture is not None else None
    return SourceShare(
        name=entry.name,
        split=split,
        rows_read=sum(report.rows_read for report in reports),
        rows_filtered=sum(report.rows_filtered for report in reports),
        rows_rejected=sum(report.rows_rejected for report in reports),
        groups=groups,
        held_out=int((held.sources == number).sum()) if held is not None else 0,
        weight=entry.weight,
        share=mixture.shares()[number] if mixture is not None else groups / len(data),
        groups_per_epoch=counts[number] if counts is not None else None,
    )
