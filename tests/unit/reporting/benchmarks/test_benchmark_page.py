"""The page of benchmark records: whole, safe, traceable, and honest about what is missing."""

from __future__ import annotations

import re

from rm_scale.reporting.benchmarks.benchmark_page import build_page, markdown
from rm_scale.reporting.benchmarks.sealed_records import Record, RecordSet
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


def test_a_page_begins_with_the_answer() -> None:
    html = build_page(RecordSet(tuple(some_records()))).html()
    first, _, folded = html.partition("<details>")
    assert "3.0 times TRL&#x27;s pairs per second with our fastest layout, in one setting." in first
    assert first.count("<svg") == 1 and first.count("<table") == 1, "one chart and one small table"
    row = "".join(f"<td>{cell}</td>" for cell in ("full, no ZeRO, 1 rank", "0.889", "2.67", "3.00", "8", "8"))
    assert f"<tr>{row}<td>without padding</td></tr>" in first
    assert "<title>TRL: 0.8889</title>" in first and "<title>rm_scale, without padding: 2.667 (3.0 ×)</title>" in first
    assert "out of memory" in first, "a setting without figures says why"
    assert 'class="sortable"' in folded and 'class="sortable"' not in first
    alone = build_page(RecordSet((record(), record(method="lora")))).html()
    assert "No peer was measured in the same settings." in alone and "<th>setting</th><th>pairs/s</th>" in alone


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
    tables = [part.splitlines() for part in re.split(r"\n\n", text) if part.startswith("|")]
    assert len(tables) >= 6, "figures, details, scaling, predictions, notes, environment, refused"
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, "all rows have the table's columns"
    assert "MFU and HFU are over the maker's peak" in text and "How to reproduce" in text and "A Processor" in text


def test_nothing_is_left_out_silently() -> None:
    many = [record(max_length=length) for length in (512, 1024)]
    html = build_page(RecordSet(tuple(many), ())).html()
    assert html.count("135m on A Processor") >= 2 and "at most 512 tokens" in html, "other settings, another table"
    assert "Scaling: not drawn, no case was measured on several numbers of ranks" in html
    assert "Loss over time: not drawn, no case has a peer" in html
    noted = record(reason="the loss was not finite in 1 steps, first in step 2")
    assert "the loss was not finite" in build_page(RecordSet((noted,), ())).html()
    crowd = [record(micro_batch=f"{number} tokens") for number in range(45)]
    assert "5 more are in the table." in build_page(RecordSet(tuple(crowd), ())).html()


def test_hostile_names_do_no_harm() -> None:
    evil = '"><script>alert(1)</script>'
    html = build_page(RecordSet((record(model=evil, data=evil),), ((evil, evil),)), title=evil).html()
    check_page(html)
