"""How the rows of one source are read: format, column map or preset, and the columns that are left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rm_scale.config import RunConfig
from rm_scale.data.column_maps.column_map import ColumnMap
from rm_scale.data.column_maps.presets import fitting_preset, preset_named


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read.

    Attributes:
        format: `dataset_format`; "auto" decides by the columns and the first rows.
        preset: name of a preset, or `None`.
        columns: a column map's settings, or `None`.
        subset_column: column that names a row's subset.
        ignore_columns: columns that are not read.
    """

    format: str = "auto"
    preset: str | None = None
    columns: Mapping[str, Any] | None = field(default=None)
    subset_column: str = "subset"
    ignore_columns: tuple[str, ...] = ()

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
        preset = fitting_preset(columns) if self.format == "auto" else None
        return preset.columns if preset is not None else None
