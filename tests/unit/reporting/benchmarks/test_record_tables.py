"""Ratios, comparisons and repetitions of benchmark records."""

from __future__ import annotations

import pytest

from rm_scale.reporting.benchmarks.record_tables import (
    bootstrap_median,
    changes,
    detail_cells,
    label,
    model_size_text,
    predicted_cells,
    ratio_of,
    repetitions,
    rows_of,
    scaling_cells,
    tag,
    throughput_cells,
)
from rm_scale.reporting.benchmarks.sealed_records import Record
from tests.support.records import case, record


def trl(seconds: list[float], **more: object) -> Record:
    return record(seconds, **{"system": "trl", "packing": "padding", "micro_batch": "4 groups", **more})


def test_a_ratio_compares_step_with_step() -> None:
    # Long steps are long on both sides: each is three times as fast, though the medians differ by more.
    ratio = ratio_of(trl([9, 3, 30, 6]), record([1, 1, 10, 2]))
    assert ratio is not None and ratio.value == 3.0 and (ratio.low, ratio.high) == (3.0, 3.0) and ratio.num_steps == 3


def test_steps_of_other_pairs_are_not_compared() -> None:
    other = record()
    steps = [step.model_copy(update={"pairs": 7}) for step in other.steps]
    assert ratio_of(trl([1, 1, 1, 1]), other.model_copy(update={"steps": steps})) is None
    assert ratio_of(record(status="failed"), other) is None


def test_ours_stands_beside_the_peer_of_its_setting() -> None:
    rows = rows_of(
        [record(), record(method="lora"), trl([9, 6, 12, 9]), record(packing="none", micro_batch="4 groups")]
    )
    assert [label(row.record.case).split(",")[0] for row in rows] == ["TRL full", "full", "full", "lora"]
    assert [row.to_peer.value if row.to_peer else None for row in rows] == [None, 3.0, 3.0, None]
    assert rows[1].peer == "trl" and rows[1].record.case.packing == "none"


def on(cpu: str, one: Record) -> Record:
    return one.model_copy(update={"environment": {"cpu": cpu}})


def test_a_peer_counts_on_its_own_machine_only() -> None:
    rows = rows_of([record(), trl([9, 6, 12, 9]), on("Another", record()), on("Another", trl([2, 4, 8, 6]))])
    ratios = [(row.record.environment["cpu"], row.to_peer.value) for row in rows if row.to_peer is not None]
    assert dict(ratios)["Another"] == 2.0 and sorted(ratio for _, ratio in ratios) == [2.0, 3.0]
    assert repetitions(rows) == [], "the same case on two machines is no repetition"


def test_sets_of_two_machines_are_compared_machine_by_machine() -> None:
    before = [record(), on("Another", record([1, 20, 40, 30]))]
    both, gone, added = changes(before, [on("Another", record([1, 20, 40, 30])), record()])
    assert [change.verdict for change in both] == ["same", "same"] and not gone and not added


def test_what_can_not_be_judged_is_no_regression() -> None:
    def verdict(before: Record, after: Record) -> str:
        (change,), _, _ = changes([before], [after])
        return change.verdict

    assert verdict(record(), on("Another", record(status="out_of_memory", reason="r"))) == "other hardware: not judged"
    assert verdict(record(), record(status="skipped", reason="not installed")) == "skipped: not judged"
    assert verdict(record([9, 2]), record([9, 4])) == "too few steps: 1"


def test_scaling_is_over_the_fewest_ranks() -> None:
    rows = rows_of([record(), record([9, 1.25, 2.5, 1.875], num_ranks=2), record(method="lora")])
    ((name, ranks, all_ranks, fewest, alone, efficiency),) = scaling_cells(rows)
    assert name == "full, prefix_shared, no ZeRO" and (ranks, fewest) == (2, 1)
    assert (round(float(str(all_ranks)), 3), round(float(str(alone)), 3)) == (4.267, 2.667) and efficiency == "80.0%"


def test_a_record_given_twice_is_no_repetition() -> None:
    peers = [trl([9, 6, 12, 9]), trl([9, 6, 12, 9], repeat=2)]
    assert repetitions(rows_of([*peers, record(), record()])) == []
    ((again),) = repetitions(rows_of([*peers, record(), record([9, 2, 4, 3.0], repeat=2)]))
    assert again.ratios == (3.0, 3.0) and again.spread == 0.0


def test_sizes_in_words() -> None:
    assert (
        model_size_text(134_515_008) == "135 M backbone parameters"
        and model_size_text(81_408) == "81 k backbone parameters"
    )


def test_bootstrap_interval_holds_the_median_and_narrows() -> None:
    few, many = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0] * 40
    low, high = bootstrap_median(few)
    assert low <= 3.0 <= high and bootstrap_median(few) == (low, high), "same seed, same interval"
    narrow_low, narrow_high = bootstrap_median(many)
    assert narrow_high - narrow_low < high - low


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (record([1, 2, 4, 3]), "same"),
        (record([1, 2.06, 4.12, 3.09]), "same"),  # 3 % slower is within the threshold
        (record([1, 2.4, 4.8, 3.6]), "regression"),
        (record([1, 1.0, 2.0, 1.5]), "faster"),
        (record(status="out_of_memory", reason="r"), "regression: out_of_memory"),
    ],
)
def test_verdicts(after: Record, verdict: str) -> None:
    both, gone, added = changes([record(), record(method="lora")], [after, record(method="qlora")])
    assert [change.verdict for change in both] == [verdict]
    assert [one.method for one in gone] == ["lora"] and [one.method for one in added] == ["qlora"]


def test_noise_is_no_regression_and_other_hardware_is_not_judged() -> None:
    noisy = record([1, 1.0, 6.0, 3.3])
    (change,), _, _ = changes([record()], [noisy])
    assert change.verdict == "same" and change.ratio is not None and change.ratio.low < 1 < change.ratio.high
    elsewhere = record([1, 20, 40, 30]).model_copy(update={"environment": {"cpu": "Another"}})
    (change,), _, _ = changes([record()], [elsewhere])
    assert change.verdict == "other hardware: not judged"
    (change,), _, _ = changes([record(status="failed", reason="x")], [record()])
    assert change.verdict == "runs now (was failed)"


def test_repetitions_of_a_ratio() -> None:
    found = [
        trl([1, 3, 3, 3]),
        record([1, 1, 1, 1]),
        trl([1, 3, 3, 3], repeat=2),
        record([1, 1.05, 1.05, 1.05], repeat=2),
    ]
    (one,) = repetitions(rows_of(found))
    assert one.peer == "trl" and sorted(one.ratios) == [pytest.approx(3 / 1.05), 3.0]
    assert one.spread == pytest.approx(0.05)
    assert repetitions(rows_of(found[:2])) == []


def test_cells_say_measured_and_predicted_apart() -> None:
    (row,) = rows_of([record()])
    assert throughput_cells(row)[1] == pytest.approx(8 / 3) and throughput_cells(row)[-2] == 8.0
    assert predicted_cells(row)[1:] == [9.0, 8.0, "+12.5%", "2.5 – 2.8", 3.0, "-6.7%"]  # type: ignore[index]
    assert detail_cells(row)[1:3] == [None, None]
    (empty,) = rows_of([record(status="out_of_memory", reason="too little")])
    assert throughput_cells(empty)[1] == "out of memory" and throughput_cells(empty)[3] is None
    assert predicted_cells(empty)[2] is None  # type: ignore[index]
    assert len(throughput_cells(empty)) == len(throughput_cells(row)) and len(detail_cells(empty)) == 12


def test_labels() -> None:
    assert label(case(zero_stage=3, offload=True, num_ranks=4, num_nodes=2, repeat=2)) == (
        "full, prefix_shared, ZeRO-3 offload, 4 ranks on 2 nodes, repeat 2"
    )
    assert tag(case(zero_stage=3, offload=True, num_ranks=4)) == "full shared z3o 4r"
    assert (
        tag(case(system="trl", packing="padding")) == "TRL full padded" and tag(case(packing="none")) == "full padded"
    )
