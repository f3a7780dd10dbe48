"""How the rows of one source are read: format, column map or preset, and the columns that are left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rm_scale.config import RunConfig
from rm_scale.config_sources import ColumnFilter
from rm_scale.data.column_maps.column_map import ColumnMap
from rm_scale.data.column_maps.presets import preset_named, recognised_preset


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read.

    Attributes:
        format: `dataset_format`; "auto" decides by the columns and the first rows.
        preset: name of a preset, or `None`.
        columns: a column map's settings, or `None`.
        subset_column: column that names a row's subset.
        ignore_columns: columns that are not read.
        filters: what the values of columns must be for a row to be read.
    """

    format: str = "auto"
    preset: str | None = None
    columns: Mapping[str, Any] | None = field(default=None)
    subset_column: str = "subset"
    ignore_columns: tuple[str, ...] = ()
    filters: tuple[ColumnFilter, ...] = ()

    @classmethod
    def of_config(cls, config: RunConfig) -> Reading:
        """Return how a run reads sources that say nothing else."""
        return cls(
            config.dataset_format,
            config.dataset_preset,
            config.dataset_columns,
            config.subset_column,
            tuple(config.ignore_columns),
        )

    @property
    def setting(self) -> str:
        """What asked for the map, for messages."""
        return f"dataset_preset={self.preset}" if self.columns is None and self.preset else "dataset_columns"

    def column_map(self, columns: Collection[str]) -> ColumnMap | None:
        """Return the map that rows go through before their format is read, or `None`.

        Args:
            columns: columns that the source has; without a map or preset they may show which public set it is.

        Raises:
            DataError: the map or the preset's name is wrong.
        """
        if self.columns is not None:
            return ColumnMap(self.columns)
        if self.preset is not None:
            return preset_named(self.preset).columns
        preset = self.recognised(columns)
        return None if preset is None else preset_named(preset).columns

    def recognised(self, columns: Collection[str]) -> str | None:
        """Return the name of the preset that is used because the columns are unmistakable, or `None`."""
        if self.format != "auto" or self.columns is not None or self.preset is not None:
            return None
        preset = recognised_preset(set(columns) - set(self.ignore_columns))
        return None if preset is None else preset.name
