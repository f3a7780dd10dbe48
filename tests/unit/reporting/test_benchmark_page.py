"""The page of benchmark records: whole, safe, traceable, and honest about what is missing."""

from __future__ import annotations

import re

from rm_scale.reporting.benchmark_page import build_page, markdown
from rm_scale.reporting.records import Record, RecordSet
from tests.support.records import record
from tests.unit.reporting.test_page import check_page


def some_records() -> list[Record]:
    peer = record([9, 6, 12, 9], system="trl", packing="padding", micro_batch="4 groups")
    return [
        peer,
        record(),
        record(packing="padding_free"),
        record(num_ranks=2),
        record(method="lora", zero_stage=3),
        record(method="qlora", status="out_of_memory", reason="killed when <600 MB> were left"),
        record(system="openrlhf", packing="padding", status="skipped", reason="openrlhf is not installed"),
    ]


def test_a_page_of_everything() -> None:
    records = some_records()
    html = build_page(RecordSet(tuple(records), (("old.json", "schema 'x'"),))).html()
    check_page(html)
    for words in ("out of memory", "openrlhf is not installed", "&lt;600 MB&gt;", "old.json", "How to reproduce"):
        assert words in html
    assert '<span class="kind predicted">predicted</span>' in html and '<span class="kind measured">' in html
    assert html.count("<svg") >= 5, "speed, memory, scaling, loss, predictions"
    for one in records:
        assert one.checksum in html and one.checksum[7:15] in html, "each row leads to its record"


def test_a_page_of_nothing_and_of_failures_alone() -> None:
    check_page(build_page(RecordSet((), ())).html())
    failed = record(status="failed", reason="exit code 1").model_copy(update={"predicted": None, "protocol": {}})
    html = build_page(RecordSet((failed,), ())).html()
    check_page(html)
    assert "exit code 1" in html and "<svg" not in html


def test_a_comparison_flags_what_got_slower() -> None:
    slower = record([1, 4, 8, 6])
    html = build_page(RecordSet((slower, record(method="lora"))), RecordSet((record(), record(method="qlora")))).html()
    check_page(html)
    assert '<td class="bad">regression</td>' in html and "1 regressions" in html
    assert "Only in the baseline" in html and "Only here" in html
    text = markdown(RecordSet((slower,)), RecordSet((record(),)))
    assert "| regression |" in text and "0.500 (0.500–0.500)" in text


def test_markdown_holds_the_same_figures() -> None:
    text = markdown(RecordSet(tuple(some_records()), (("old.json", "a | b"),)))
    row = next(line for line in text.splitlines() if line.startswith("| full, prefix_shared, no ZeRO, 1 rank |"))
    assert "| 2.67 | 3.00 (3.00–3.00) |" in row
    assert "a \\| b" in text and "openrlhf is not installed" in text
    widths = {block.count("|") for block in re.findall(r"^\|.*\|$", text.split("\n\n")[2], flags=re.M)}
    assert len(widths) == 1, "all rows of a table have its columns"


def test_hostile_names_do_no_harm() -> None:
    evil = '"><script>alert(1)</script>'
    html = build_page(RecordSet((record(model=evil, data=evil),), ((evil, evil),)), title=evil).html()
    check_page(html)
