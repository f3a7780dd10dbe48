"""Records are versioned, sealed, and give the figures that their steps hold."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_scale.reporting.benchmarks.sealed_records import (
    Case,
    Record,
    RecordError,
    RecordSet,
    case_name,
    checksum,
    find_record,
    measures,
    percentile,
    read_record,
    read_records,
    write_record,
)
from tests.support.records import case, record

REPOSITORY = Path(__file__).resolve().parents[4]
RESULTS = REPOSITORY / "benchmarks" / "results"


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = record()
    path = write_record(written, tmp_path / "new")
    assert read_record(path) == written
    assert path == tmp_path / "new" / "135m.jsonl" and written.checksum.startswith("sha256:")
    assert path.read_text().count("\n") == 1 and path.read_text().endswith("\n")
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert read_record(alone) == written, "layout is not content"


def test_an_edited_record_is_found_out(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    content = json.loads(path.read_text())
    content["steps"][2]["seconds"] = 1.0
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"checksum does not fit the content, so it was changed .* Fix: run the case"):
        read_record(path)


def test_other_versions_and_other_files(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema": "rm_scale.benchmark/7"}))
    with pytest.raises(
        RecordError, match=r"schema 'rm_scale.benchmark/7', and this version reads 'rm_scale.benchmark/1'"
    ):
        read_record(path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(RecordError, match="schema None"):
        read_record(tmp_path / "list.json")
    (tmp_path / "half.json").write_text('{"schema": "rm_scale.benchm')
    with pytest.raises(RecordError, match="can't be read as JSON"):
        read_record(tmp_path / "half.json")
    strange = {**content, "colour": "red"}
    strange["checksum"] = checksum(strange)
    path.write_text(json.dumps(strange))
    with pytest.raises(RecordError, match="colour: Extra inputs are not permitted"):
        read_record(path)


def test_a_folder_gives_records_and_names_what_it_refused(tmp_path: Path) -> None:
    good = record()
    write_record(good, tmp_path / "deep" / "er")
    bad = write_record(record(method="lora"), tmp_path)
    bad.write_text(bad.read_text().replace('"seconds":2.0', '"seconds":1.0'))
    (tmp_path / "packing.json").write_text('{"cases": {}}')  # another benchmark's
    found = read_records([tmp_path])
    assert found.records == (good,)
    ((name, reason),) = found.refused
    assert name == f"{bad.name} line 1" and reason.startswith("the checksum does not fit")
    with pytest.raises(RecordError, match="no such file or folder"):
        read_records([tmp_path / "nowhere"])
    alone = read_records([tmp_path / "packing.json"])
    assert not alone.records and "schema None" in alone.refused[0][1], "a file that was named is not passed over"


def test_what_can_not_be_read_is_refused_by_name(tmp_path: Path) -> None:
    content = record().as_dict()
    reordered = {key: content[key] for key in sorted(content)}
    (tmp_path / "reordered.json").write_text(json.dumps({**reordered, "warmup_steps": 0}, indent=1))
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "half.json").write_text(json.dumps(content)[:60])
    steps = [{**content["steps"][0], "loss": math.nan}, *content["steps"][1:]]
    (tmp_path / "nan.json").write_text(json.dumps({**content, "steps": steps}))
    (tmp_path / "unnamed.json").write_text(json.dumps({key: content[key] for key in content if key != "schema"}))
    found = read_records([tmp_path])
    assert not found.records
    assert [name for name, _ in found.refused] == [
        f"{n}.json" for n in ("empty", "half", "nan", "reordered", "unnamed")
    ]


def test_a_case_that_is_measured_again_takes_its_own_line(tmp_path: Path) -> None:
    others = [record(method="lora"), record(), record(method="qlora")]
    for one in others:
        write_record(one, tmp_path)
    again = record([9, 1.0, 1.0, 1.0])
    path = write_record(again, tmp_path)
    assert read_records([path]).records == (others[0], again, others[2])
    assert find_record(again.case, tmp_path) == again
    assert find_record(case(repeat=2), tmp_path) is None and find_record(case(model="7b"), tmp_path) is None


def test_a_line_that_was_cut_off_is_named_and_harms_no_other(tmp_path: Path) -> None:
    first, second = record(), record(method="lora")
    path = write_record(first, tmp_path)
    whole = path.read_text()
    path.write_text(whole + whole[:500])  # the machine went down while the second line was written
    for found in (read_records([tmp_path]), read_records([path])):
        assert found.records == (first,)
        ((name, reason),) = found.refused
        assert name == "135m.jsonl line 2"
        assert reason.startswith("can't be read as JSON (cut off while it was written: ")
        assert reason.endswith("Fix: delete line 2 and run the case again.")
    write_record(second, tmp_path)
    found = read_records([tmp_path])
    assert found.records == (first, second) and [name for name, _ in found.refused] == ["135m.jsonl line 2"]
    path.write_text(whole[:500])
    assert [name for name, _ in read_records([tmp_path]).refused] == ["135m.jsonl line 1"], "nor is it alone in a file"


def test_a_folder_mixes_lines_and_files_of_one_record(tmp_path: Path) -> None:
    old, new = record(), record(method="lora")
    (tmp_path / "135m").mkdir()
    (tmp_path / "135m" / "old.json").write_text(json.dumps(old.as_dict(), indent=1))
    write_record(new, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n{"loss": 2.0}\n{"lo')  # a run's
    assert read_records([tmp_path]) == RecordSet((old, new))
    mixed = write_record(old, tmp_path / "mixed")
    mixed.write_text(mixed.read_text() + '{"loss": 1.0}\n')
    found = read_records([mixed.parent])
    assert found.records == (old,) and "schema None" in found.refused[0][1]
    with pytest.raises(RecordError, match="2 records, and one was expected"):
        read_record(mixed)


def _write_many(folder: Path, first: int) -> None:
    for number in range(first, first + 8):
        write_record(record(repeat=number), folder)
        write_record(record(repeat=1000), folder)


def test_writers_at_the_same_time_lose_no_line(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_write_many, args=(tmp_path, n)) for n in (10, 30)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    found = read_records([tmp_path])
    assert found.refused == () and sorted(one.case.repeat for one in found.records) == [
        *range(10, 18),
        *range(30, 38),
        1000,
    ]


def test_energy_is_over_the_pairs_of_what_was_counted() -> None:
    four = record(num_ranks=4)
    of_a_rank = measures(four.model_copy(update={"energy_scope": "rank"}))
    of_a_node = measures(four.model_copy(update={"energy_scope": "node"}))
    assert of_a_node is not None and of_a_node.joules_per_pair == pytest.approx(5.0), "40 J, 8 pairs"
    assert of_a_rank is not None and of_a_rank.joules_per_pair == pytest.approx(20.0), "three more GPUs drew as much"


def test_measures_by_hand() -> None:
    found = measures(record([100.0, 2.0, 4.0, 3.0], num_ranks=2))
    assert found is not None
    # Steps of 2, 4 and 3 s; the first is warm-up. Two devices.
    assert found.pairs_per_second == pytest.approx(8 / 3 / 2)
    assert found.effective_tokens_per_second == pytest.approx(1600 / 3 / 2)
    assert (found.step_seconds_p50, found.step_seconds_p95) == (3.0, 4.0)
    assert found.useful_share == pytest.approx(6e12 / 3 / 2 / 2e12)
    assert found.executed_share == pytest.approx(9e12 / 3 / 2 / 2e12)
    assert found.mfu is None and found.hfu is None, "no maker's peak: undefined, not zero"
    assert found.data_wait_share == pytest.approx(0.3 / 9) and found.communication_share == pytest.approx(0.6 / 9)
    assert found.joules_per_pair == pytest.approx(120 / 24)
    with_peak = record().model_copy(update={"peak_flops_per_device": 1e13})
    assert (m := measures(with_peak)) is not None and m.mfu == pytest.approx(6e12 / 3 / 1e13)


def test_what_was_not_measured_stays_empty() -> None:
    plain = record()
    steps = [step.model_copy(update={"communication_seconds": None, "energy_joules": None}) for step in plain.steps]
    found = measures(plain.model_copy(update={"steps": steps}))
    assert found is not None and found.communication_share is None and found.joules_per_pair is None
    assert measures(record(status="out_of_memory")) is None
    assert measures(plain.model_copy(update={"warmup_steps": 4})) is None


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 21)]
    assert [percentile(values, share) for share in (0.0, 0.05, 0.5, 0.95, 1.0)] == [1, 1, 10, 19, 20]
    assert percentile([3.0], 0.95) == 3.0


names = st.sampled_from(["rm_scale", "trl"])
cases = st.builds(
    case,
    system=names,
    method=st.sampled_from(["full", "lora", "qlora"]),
    packing=st.sampled_from(["none", "padding_free", "prefix_shared", "padding"]),
    zero_stage=st.sampled_from([0, 1, 2, 3]),
    offload=st.booleans(),
    num_ranks=st.integers(1, 4),
    global_batch_size=st.integers(1, 4),
    max_length=st.sampled_from([512, 1024]),
    gradient_checkpointing=st.booleans(),
    repeat=st.integers(1, 3),
)


@given(cases, cases)
def test_unlike_cases_have_unlike_names(first: Case, second: Case) -> None:
    assert (case_name(first) == case_name(second)) == (first == second)
    assert "/" not in case_name(first) and " " not in case_name(first)


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=9))
def test_any_record_survives_its_file(seconds: list[float]) -> None:
    made = record(seconds)
    assert Record.model_validate(json.loads(json.dumps(made.as_dict()))) == made
    assert checksum(made.as_dict()) == made.checksum


def test_the_committed_schema_is_the_one_in_use() -> None:
    schema = json.loads((RESULTS / "record.schema.json").read_text())
    assert schema == Record.model_json_schema(by_alias=True), "python benchmarks/schema.py writes it"


def test_all_committed_records_are_sound() -> None:
    found = read_records([RESULTS])
    assert found.refused == () and len(found.records) >= 169
    assert not [file for file in RESULTS.glob("*/*/*.json") if "checksum" in file.read_text()], "a line per case"
    assert {one.case.system for one in found.records} >= {"rm_scale", "trl"}
    for one in found.records:
        # Folders of the kernel's are the same on every machine; any other absolute one is somebody's.
        assert not re.findall(r"(?<![\w.:/-])/(?!sys/|proc/|dev/)\w[\w.-]*/", json.dumps(one.as_dict())), one.name
