"""What a run notes of its time, energy and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rm_scale.training.energy import EnergyMeter
from rm_scale.training.step_timing import CollectiveClock, memory_peaks


def test_a_run_leaves_its_times(full_run: Path) -> None:
    lines = [json.loads(line) for line in (full_run / "run" / "steps.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (full_run / "run" / "metrics.jsonl").read_text().splitlines()]
    last = max(line["step"] for line in metrics)
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    for line in lines:
        assert 0 <= line["data_wait_seconds"] < line["seconds"]
        assert line["communication_seconds"] == 0.0, "there is nobody to wait for"
    timing = json.loads((full_run / "run" / "timing.json").read_text())
    assert timing["load_seconds"] > 0 and timing["seconds_to_training"] > timing["load_seconds"]
    assert timing["load_peak_memory_bytes"] > 0 and timing["peak_memory"]["host_bytes"] > 0
    assert timing["peak_memory"]["allocated_bytes"] is None and timing["energy"]


def test_a_process_has_a_peak_of_its_own() -> None:
    """`ru_maxrss` goes from parent to child, and can't be forgotten."""
    code = (
        "from rm_scale.training.meters import resident_peak_bytes as peak; from rm_scale.training.step_timing import *;"
        "x = b'1' * 800_000_000; high = peak(); del x; forget_peaks(); print(high, peak())"
    )
    held = b"1" * 1_500_000_000
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    high, low = map(int, run.stdout.split())
    assert len(held) > high > 800e6 and low < high - 500e6


def test_a_counter_that_breaks_ends_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    for name in ("energy_uj", "max_energy_range_uj"):
        (folder / name).write_text("5\n")
    meter = EnergyMeter(tmp_path)
    assert meter.joules() == 0.0 and meter.scope == "node"
    (folder / "energy_uj").unlink()
    assert meter.joules() is None and "FileNotFoundError" in meter.source


def test_counts_of_a_step_are_logged(full_run: Path) -> None:
    first = json.loads((full_run / "run" / "metrics.jsonl").read_text().splitlines()[0])["num_tokens"]
    assert 0 < first["real"] <= first["processed"] and first["real"] <= first["effective"]
    assert first["attended_pairs"] > first["real"] and first["squares"] > first["effective"]


def test_torch_is_left_as_it_was() -> None:
    from torch._C._distributed_c10d import Work

    plain = Work.wait
    clock = CollectiveClock()
    assert clock.start(uses_ddp=False), "alone there is nothing to wait for"
    assert Work.wait is plain
    clock.stop()
    assert Work.wait is plain and clock.seconds == 0.0


def test_processor_energy_counts_all_packages_and_wraps(tmp_path: Path) -> None:
    for number, (now, most) in enumerate([(1_000_000, 5_000_000), (7_000_000, 9_000_000)]):
        folder = tmp_path / f"intel-rapl:{number}"
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{now}\n")
        (folder / "max_energy_range_uj").write_text(f"{most}\n")
    inner = tmp_path / "intel-rapl:0:0"  # a part of a package, counted in it
    inner.mkdir()
    (inner / "energy_uj").write_text("5\n")
    meter = EnergyMeter(tmp_path)
    before = meter.joules()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("3500000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500000\n")  # ran over: 2 J to the end and 0.5 J on
    after = meter.joules()
    assert before is not None and after is not None
    assert after - before == pytest.approx(2.5 + 2.5) and meter.source == "all processors of this machine, by RAPL"


def test_no_energy_says_why(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path / "none")
    assert meter.joules() is None and "no readable energy_uj" in meter.source


def test_peaks() -> None:
    peaks = memory_peaks()
    assert peaks["host_bytes"] is not None and peaks["host_bytes"] > 10_000_000
    assert (peaks["allocated_bytes"] is None) == (not torch.cuda.is_available())
