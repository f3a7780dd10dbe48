"""What docs/results.md says of throughput is what the committed records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import publish
from rm_scale.reporting.benchmarks.record_tables import rows_of
from rm_scale.reporting.benchmarks.sealed_records import read_records
from tests.support.records import record


def test_every_row_leads_to_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "PICTURES", tmp_path)
    peer = record([9, 6, 12, 9], system="trl", packing="padding", micro_batch="4 groups")
    records = [peer, record(), record(num_ranks=2), record(method="qlora", status="out_of_memory", reason="no room")]
    text = publish.section(rows_of(records))
    for one in records:
        assert one.checksum[7:15] in text
    assert "### 135m, 135 M backbone parameters, on A Processor" in text and "no room" in text
    assert "3.00 (3.00–3.00)" in text and "Scaling over ranks" in text
    (picture,) = tmp_path.iterdir()
    assert f"pictures/{picture.name}" in text and picture.name == "throughput_a_135m.svg"


def test_the_page_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "PICTURES", tmp_path)
    found = read_records(sorted(path for path in publish.RESULTS.iterdir() if path.is_dir()))
    assert found.refused == (), "no committed record was edited"
    text = publish.PAGE.read_text(encoding="utf-8")
    assert publish.written(text, found.records) == text, "run python benchmarks/publish.py"
