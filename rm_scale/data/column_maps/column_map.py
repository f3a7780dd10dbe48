"""Rewrite a row of any columns as one that a format reads: `dataset_columns`, or the map of a preset.

A map says for each column of a format where its value stands in the row. `docs/data_formats.md` describes its language.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rm_scale.data.column_maps.paths import value_at
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row
from rm_scale.errors import DataError

TARGETS = ("prompt", "chosen", "rejected", "responses", "better", "margin", "soft_label", "tools", "id", "subset")
"""What a map may say the place of."""


@dataclass(frozen=True)
class ColumnMap:
    """Where each column of a format stands in the rows of a source.

    Attributes:
        settings: the declaration, as in YAML.
    """

    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        unknown = [name for name in self.settings if name not in TARGETS]
        if unknown:
            raise DataError(
                f"dataset_columns: {unknown[0]} is no column of any format. Fix: one of {', '.join(TARGETS)}."
            )

    def apply(self, row: Row) -> dict[str, Any]:
        """Return the row in the columns of a format.

        Raises:
            RejectedRow: a column that the map names is absent, or a label is none of those that it names.
        """
        found = {name: value_at(row, path) for name, path in self.settings.items() if isinstance(path, str)}
        responses = self.settings.get("responses")
        if isinstance(responses, list):
            values = [value_at(row, path) for path in responses]
            if "better" not in self.settings:
                return {**found, "responses": values}
            found["response_0"], found["response_1"] = values
            found["better_response_id"] = _better(row, self.settings["better"])
        return found


def _better(row: Row, label: Mapping[str, Any]) -> int:
    value = value_at(row, label["path"])
    for number, name in enumerate(("first", "second")):
        if value in label[name]:
            return number
    raise RejectedRow(
        "bad_label", f"{label['path']}={value!r} is none of the labels {label['first'] + label['second']}"
    )
