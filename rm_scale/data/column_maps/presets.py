"""Named maps of public preference sets, from `presets.yaml`."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.data.column_maps.column_map import ColumnMap
from rm_scale.errors import DataError
from rm_scale.yaml_files import read_yaml

_FILE = Path(__file__).with_name("presets.yaml")


@dataclass(frozen=True)
class Preset:
    """How the rows of a public set are read.

    Attributes:
        name: as `dataset_preset` takes it.
        about: what it is, in one line.
        columns: its map.
        needs: columns by which such a file is told from others; empty where they could be anybody's.
    """

    name: str
    about: str
    columns: ColumnMap
    needs: frozenset[str] = frozenset()


@functools.cache
def presets() -> Mapping[str, Preset]:
    """Return all presets by name."""
    entries: dict[str, Any] = read_yaml(_FILE)
    return {
        name: Preset(name, entry["about"], ColumnMap(entry["columns"]), frozenset(entry.get("needs", ())))
        for name, entry in entries.items()
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


def fitting_preset(columns: Collection[str]) -> Preset | None:
    """Return the preset whose columns a file has, where no other one fits."""
    fitting = [preset for preset in presets().values() if preset.needs and preset.needs <= set(columns)]
    return fitting[0] if len(fitting) == 1 else None
