"""The files and hub data sets that the settings `datasets` and `eval_datasets` name, each read in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rm_scale.config import RunConfig
from rm_scale.config_sources import SourceSettings, sources_in
from rm_scale.data.hub_sources import HubSplit, hub_source
from rm_scale.data.reading import Reading
from rm_scale.data.sources import SUPPORTED_SUFFIXES, Source, is_saved_dataset, local_sources
from rm_scale.errors import DataError


def listed_sources(config: RunConfig, setting: str) -> list[Source]:
    """Return what a list of sources names: a source per file, which knows the entry that it belongs to.

    Args:
        config: the run's settings; what an entry does not say is read as they do.
        setting: `datasets` or `eval_datasets`.

    Raises:
        DataError: a file, pattern or hub data set is not there, or is read under two entries.
    """
    is_training = setting == "datasets"
    usual = config.dataset_train_split if is_training else config.dataset_test_split or "test"
    found = []
    for entry in sources_in(config, setting):
        reading = reading_of(entry, config)
        where, streamed = f"{setting}: {entry.name}", is_training and config.streaming
        for source in _sources_of(entry, entry.split or usual, where, streamed):
            found.append(replace(source, reading=reading, member=entry.name))
    _require_read_once(found, setting)
    return found


def reading_of(entry: SourceSettings, config: RunConfig) -> Reading:
    """Return how the rows of an entry are read: as it says, and where it says nothing as the run says of its data."""
    usual = Reading.of_config(config)
    says = entry.preset is not None or entry.columns is not None or entry.format is not None
    return Reading(
        format=(entry.format or "auto") if says else usual.format,
        preset=entry.preset if says else usual.preset,
        columns=entry.columns if says else usual.columns,
        subset_column=entry.subset_column or usual.subset_column,
        ignore_columns=usual.ignore_columns if entry.ignore_columns is None else entry.ignore_columns,
        filters=entry.filters,
    )


def _sources_of(entry: SourceSettings, split: str, where: str, streamed: bool) -> list[Source]:
    if entry.hub is not None:
        asked = HubSplit(entry.hub, entry.config, split, entry.revision, entry.data_dir, f"{where}: hub")
        return [hub_source(asked, streamed)]
    files = [file for path in entry.paths for file in _files_of(path, where)]
    return local_sources(files, split, f"{where}: path")


def _files_of(path: str, where: str) -> Iterator[str]:
    """Yield the files of a folder of preference files; any other path as it is."""
    folder = Path(path)
    if not folder.is_dir() or is_saved_dataset(folder):
        yield path
        return
    files = [str(file) for file in sorted(folder.rglob("*")) if file.name.lower().endswith(SUPPORTED_SUFFIXES)]
    if not files:
        raise DataError(
            f"{where}: path={path}: the folder holds no file that can be read ({', '.join(SUPPORTED_SUFFIXES)}). Fix: "
            "check it with ls."
        )
    yield from files


def _require_read_once(sources: list[Source], setting: str) -> None:
    """Refuse a file that two entries read alike: its rows would count twice under two names."""
    seen: dict[tuple[str, str], str] = {}
    for source in sources:
        key = (str(sorted(source.identity.items(), key=str)), str(source.reading))
        if seen.setdefault(key, source.member) != source.member:
            raise DataError(
                f"{setting}: {source.name}: is read by {seen[key]} and by {source.member}, with the same filters. Fix: "
                "name it once, with a weight or epochs."
            )
