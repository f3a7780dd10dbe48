"""The picture of the README shows what the committed records say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from benchmarks import pictures
from rm_scale.reporting.benchmarks.record_tables import rows_of
from rm_scale.reporting.benchmarks.sealed_records import measures, read_records
from tests.support.records import record


def test_the_picture_is_what_the_records_give() -> None:
    records = read_records([pictures.RECORDS]).records
    text = pictures.AGAINST_TRL.read_text(encoding="utf-8")
    assert text == pictures.against_trl(rows_of(records)), "run python -m benchmarks.pictures"
    assert len(text.encode()) <= 60_000 and "<script" not in text
    told = re.findall(r"<title>(TRL|rm_scale, [a-z ]+): ([\d.]+)", text)
    assert len(told) == 2 * 3 * 3, "two stages, three methods, TRL and two layouts"
    found = [found.pairs_per_second for one in records if (found := measures(one)) is not None]
    for _, speed in told:
        assert any(f"{value:.4g}" == speed for value in found), f"{speed} is in no record"


def test_a_case_that_was_not_run_or_ran_out_of_memory_says_so() -> None:
    trl = record([9, 6, 12, 9], system="trl", packing="padding", micro_batch="4 groups")
    full = record(status="out_of_memory", reason="r")
    svg = pictures.against_trl(rows_of([trl, full, record(method="lora"), record(num_ranks=4)]))
    shown = ["".join(element.itertext()) for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]
    assert "out of memory" in shown and shown.count("not run") == 3, "no bar stands for what has no figure"
    assert not any("4 ranks" in text for text in shown)
