"""Named maps of public preference sets, from `presets.yaml`, and which of them fits a file."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rm_scale.config_columns import preset_entries
from rm_scale.data.column_maps.column_map import ColumnMap, missing_paths
from rm_scale.data.formats import fits_a_format
from rm_scale.data.row_values import Row
from rm_scale.errors import DataError


@dataclass(frozen=True)
class Preset:
    """How the rows of a public set are read.

    Attributes:
        name: as `dataset_preset` takes it.
        about: what it is, in one line.
        source: where its columns are described.
        columns: its map.
        known_by: columns by which such a file is told from all others; empty where they could be anybody's.
    """

    name: str
    about: str
    source: str
    columns: ColumnMap
    known_by: frozenset[str] = frozenset()

    def missing(self, sample: Sequence[Row]) -> list[str]:
        """Return what the map reads and no row of a sample has; the rows are the file's own."""
        return self.columns.missing_before(sample) if self.columns.regroups else missing_paths(self.columns, sample)


@functools.cache
def presets() -> Mapping[str, Preset]:
    """Return all presets by name."""
    return {
        name: Preset(
            name, entry["about"], entry["source"], ColumnMap(entry["columns"]), frozenset(entry.get("known_by", ()))
        )
        for name, entry in preset_entries().items()
    }


def preset_named(name: str) -> Preset:
    """Return a preset.

    Raises:
        DataError: there is none of that name.
    """
    found = presets().get(name)
    if found is None:
        raise DataError(f"dataset_preset={name}: is unknown. Fix: one of {', '.join(sorted(presets()))}.")
    return found


def recognised_preset(columns: Collection[str]) -> Preset | None:
    """Return the preset that a file's columns tell without a doubt, or `None`; columns of a format need none."""
    if fits_a_format(columns):
        return None
    found = [preset for preset in presets().values() if preset.known_by and preset.known_by <= set(columns)]
    return found[0] if len(found) == 1 else None


def fitting_presets(sample: Sequence[Row]) -> list[str]:
    """Return the names of the presets whose maps find what they read in a sample of a file's rows.

    Of sets that are known by their columns all of these must be there.
    """
    columns = {column for row in sample for column in row}
    return [name for name, preset in presets().items() if preset.known_by <= columns and not preset.missing(sample)]
