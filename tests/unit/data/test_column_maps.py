"""Rows of other columns, read through a column map or a preset."""

from __future__ import annotations

from rm_scale.data.column_maps.column_map import ColumnMap
from rm_scale.data.column_maps.presets import fitting_preset


def test_the_number_of_the_better_output_of_llmbar() -> None:
    preset = fitting_preset(["input", "output_1", "output_2", "label"])
    assert preset is not None and preset.name == "llmbar"
    row = preset.columns.apply({"input": "2 + 2?", "output_1": "5", "output_2": "4", "label": 2})
    assert row == {"prompt": "2 + 2?", "response_0": "5", "response_1": "4", "better_response_id": 1}


def test_a_value_deep_inside_a_row() -> None:
    column_map = ColumnMap({"prompt": "meta.question", "chosen": "answers[0].text", "rejected": "answers[-1].text"})
    row = column_map.apply({"meta": {"question": "2 + 2?"}, "answers": [{"text": "4"}, {"text": "5"}]})
    assert row == {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
