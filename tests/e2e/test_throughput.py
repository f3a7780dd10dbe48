"""The throughput benchmark through the real launcher, on a tiny model: records, resumption, failures, the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rm_scale.cli import main
from rm_scale.reporting.benchmarks.sealed_records import Record, measures, read_records
from tests.support.launching import REPOSITORY

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
FIGURES = (
    "devices: {cpu-test: {like: cpu, title: Test Processor, matmul_flops: 1.0e+12, memory_bandwidth: 2.0e+10, "
    "memory_bytes: 2.0e+10, devices_per_node: 2}}\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("throughput")
    (made / "hardware.yaml").write_text(FIGURES)
    return made


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    fixed = ["--tier", "tiny", "--work", str(folder / "work"), "--results", str(folder / "results")]
    fixed += ["--hardware", str(folder / "hardware.yaml"), "--steps", "2", "--warmup", "1", "--global_batch_size", "4"]
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "throughput.py"), *fixed, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def measured(folder: Path) -> list[Record]:
    """Ours and TRL's on two ranks under ZeRO-2, and a peer that is not here."""
    words = ["--methods", "lora", "--stages", "2", "--ranks", "2", "--peers", "trl,openrlhf", "--micro_batch", "2"]
    done = bench(folder, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = read_records([folder / "results"])
    assert not found.refused and len(found.records) == 3
    assert [path.name for path in (folder / "results").glob("*.jsonl")] == ["tiny.jsonl"], "a line per case"
    return list(found.records)


def of(records: list[Record], system: str) -> Record:
    return next(record for record in records if record.case.system == system)


def test_records_hold_what_a_reader_needs(measured: list[Record]) -> None:
    for record in (of(measured, "rm_scale"), of(measured, "trl")):
        found = measures(record)
        assert record.status == "ok" and len(record.steps) == 3 and len(record.counted) == 2
        assert found is not None and found.pairs_per_second > 0 and found.mfu is None and found.useful_share is not None
        assert found.communication_share is not None and 0 < found.communication_share < 1
        assert [step.pairs for step in record.steps] == [4, 4, 4]
        assert all(step.loss is not None for step in record.steps)
        assert record.memory.host_bytes and record.environment["packages"]["torch"]
        assert bool(record.load_seconds) == (record.case.system == "rm_scale"), "a peer's load can't be told apart"
        text = json.dumps(record.as_dict())
        assert str(REPOSITORY) not in text and "pytest" not in text
    ours = of(measured, "rm_scale")
    assert ours.predicted is not None and ours.plan["zero_stage"] == 2 and ours.config["use_peft"] is True
    assert ours.saved is not None and ours.saved.verified and ours.saved.bytes > 0
    assert of(measured, "trl").config["max_steps"] == 3, "all of the peer's own settings"
    assert of(measured, "openrlhf").status == "skipped"


def test_both_sides_trained_on_the_same_pairs(measured: list[Record]) -> None:
    ours, trl = of(measured, "rm_scale"), of(measured, "trl")
    assert [step.effective_tokens for step in ours.steps] == [step.effective_tokens for step in trl.steps]
    assert [step.useful_flops for step in ours.steps] == [step.useful_flops for step in trl.steps]
    assert all(a.processed_tokens < b.processed_tokens for a, b in zip(ours.steps, trl.steps, strict=True))


def test_finished_cases_are_not_run_again(folder: Path, measured: list[Record]) -> None:
    words = ["--methods", "lora", "--stages", "2", "--ranks", "2", "--peers", "trl", "--micro_batch", "2"]
    again = bench(folder, *words)
    assert again.returncode == 0 and again.stdout.count("(have it)") == 2
    assert [one.checksum for one in read_records([folder / "results"]).records] == [one.checksum for one in measured]


def test_a_case_that_fails_is_recorded_and_the_rest_goes_on(
    folder: Path, measured: list[Record], tmp_path: Path
) -> None:
    words = ["--methods", "full", "--results", str(tmp_path), "--train", "--head_lr", "3"]
    done = bench(folder, *words)
    assert done.returncode == 1
    (record,) = read_records([tmp_path]).records
    assert record.status == "failed" and "exit code 2" in record.reason and not record.steps


def test_the_page_of_these_records(folder: Path, measured: list[Record], tmp_path: Path) -> None:
    words = [str(folder / "results"), "--output", str(tmp_path / "p.html"), "--markdown", str(tmp_path / "p.md")]
    assert main(["report", *words]) == 0
    page = (tmp_path / "p.html").read_text()
    assert "TRL lora, padding, ZeRO-2, 2 ranks" in page and "openrlhf is not installed" in page
    assert of(measured, "rm_scale").checksum in page
