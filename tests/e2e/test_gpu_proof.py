"""`make gpu-proof --rehearse`: the same processes, limits and records as on a card, on a processor at small sizes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_proof.plan import STEPS
from benchmarks.gpu_proof.record import REHEARSAL, StepRecord, read_step, read_steps
from rm_scale.reporting.benchmarks.sealed_records import RecordError, read_records
from tests.support import cuda_standin
from tests.support.launching import REPOSITORY

pytestmark = [pytest.mark.long, pytest.mark.e2e, pytest.mark.distributed, pytest.mark.timeout(1800)]
LEFT_OUT = {"1b_qlora", "7b_lora"}
"""The same code as the other two throughput steps, with their words the other way round."""


def rehearse(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--rehearse", "--jobs", "2", "--commit", "0123abc"]
    command += ["--results", str(folder / "results"), "--scratch", str(folder / "scratch"), "--wheels", str(folder)]
    env = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([*command, *words], capture_output=True, text=True, cwd=REPOSITORY, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proof")


@pytest.fixture(scope="module")
def rehearsed(folder: Path) -> subprocess.CompletedProcess[str]:
    """Every step once."""
    names = [step.name for step in STEPS if step.name not in LEFT_OUT]
    return rehearse(folder, "--only", ",".join(names), "--archive", str(folder / "proof.tar.gz"))


@pytest.fixture(scope="module")
def steps(folder: Path, rehearsed: subprocess.CompletedProcess[str]) -> dict[str, StepRecord]:
    found, refused = read_steps(folder / "results" / "processor" / "gpu_proof", rehearsal=True)
    assert not refused and {record.name for record in found} == {step.name for step in STEPS} - LEFT_OUT
    return {record.name: record for record in found}


def test_every_step_succeeds(rehearsed: subprocess.CompletedProcess[str], steps: dict[str, StepRecord]) -> None:
    bad = {name: record.reason for name, record in steps.items() if record.status != "ok"}
    assert rehearsed.returncode == 0 and not bad, f"{bad}\n{rehearsed.stdout[-3000:]}\n{rehearsed.stderr[-2000:]}"
    for number, step in enumerate(STEPS, 1):
        if step.name not in LEFT_OUT:
            assert re.search(rf"^\[ *\d+ s\] +{number} {step.name} +ok ", rehearsed.stdout, re.MULTILINE), step.name
            assert steps[step.name].verdict in rehearsed.stdout, "its key numbers, as it ends"


def test_what_the_steps_have_found(steps: dict[str, StepRecord]) -> None:
    figures = {name: record.figures for name, record in steps.items()}
    assert figures["doctor"]["doctor"]["counts"]["pass"] > 10 and figures["doctor"]["tests"]["skipped"] > 0
    assert len(figures["zero3"]["full"]["losses"]) == len(figures["zero3"]["lora"]["losses"]) == 2
    assert len(figures["qlora"]["scores"]) == 16 and figures["qlora"]["golden"]["moved"]["cpu"] < 0.05
    billion = figures["one_billion"]
    assert len(billion["train"]["losses"]) == 3 and billion["train"]["save_and_verify_seconds"] > 0
    assert billion["train"]["plan"]["predicted"]["peak_memory_bytes"] > 0
    assert billion["tables"]["golden scores"][0].keys() == {"golden text", "training", "cpu"}
    assert figures["parity"]["largest_relative_difference"] < 1e-4
    assert "rank 1 does not answer" in figures["stopped_rank"]["said"]
    assert figures["syncs"]["blocking"]["per_step"] == [1, 1, 1], "the call that stands in for those of a card"
    assert figures["syncs"]["blocking"]["micro_steps"] >= 3
    tables = figures["syncs"]["tables"]
    assert any(row["kernel"] == "aten::mm" for row in tables["kernels of three steps"])
    assert {row["backend"] for row in figures["attention"]["tables"]["attention over 256 tokens"]} == {"sdpa", "matmul"}
    assert figures["hardware"]["device"]["matmul_flops"] > 0


@pytest.mark.parametrize("name", ["1b_lora", "7b_qlora"])
def test_throughput_of_both_systems(name: str, steps: dict[str, StepRecord]) -> None:
    (rows,) = steps[name].figures["tables"].values()
    assert [row["system"] for row in rows] == ["rm_scale", "trl"]
    ours, trl = rows
    assert all(row["status"] == "ok" and row["pairs/s"] > 0 and row["peak GB"] > 0 for row in rows)
    assert ours["predicted GB"] > 0 and "predicted s/step" in ours and ours["save s"] > 0
    tried = steps[name].figures["trl_candidates"]
    assert [one["micro_batch"] for one in tried] == [4, 2] and all(one["status"] == "ok" for one in tried)
    best = max(tried, key=lambda one: one["pairs_per_second"])
    assert trl["micro-batch"] == f"{best['micro_batch']} groups", "TRL stands there with its best"


def test_records_are_sealed_rehearsals_and_name_no_place(
    folder: Path, rehearsed: subprocess.CompletedProcess[str], steps: dict[str, StepRecord]
) -> None:
    results = folder / "results" / "processor"
    for record in steps.values():
        assert record.schema_name == REHEARSAL and record.environment["packages"]["torch"] and record.commit
        with pytest.raises(RecordError, match="of a rehearsal at small sizes"):
            read_step(record.name, results / "gpu_proof")
        text = json.dumps(record.as_dict())
        assert not re.findall(r"(?<![\w.:/-])/(?!sys/|proc/|dev/)\w[\w.-]*/", text), record.name
    assert read_records([results]).records == (), "no measurement of it lies where tables are made from"
    assert "nothing here is a measurement" in (results / "gpu_proof" / "summary.md").read_text()
    assert (folder / "proof.tar.gz").stat().st_size > 1000
    assert list((folder / "scratch").iterdir()) == [], "models and runs are taken away"


def test_the_same_on_a_stand_in_for_cuda(tmp_path: Path) -> None:
    """Where the GPU's way differs: one visible device, scores on both, the device's memory in the predictions."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_proof",
        "--rehearse",
        "cuda",
        "--jobs",
        "2",
        "--wheels",
        str(tmp_path),
    ]
    command += [
        "--only",
        "one_billion,1b_lora",
        "--results",
        str(tmp_path / "results"),
        "--scratch",
        str(tmp_path / "s"),
    ]
    env = cuda_standin.environment(2, PYTHON=sys.executable)
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=env)
    (folder,) = (tmp_path / "results").glob("cuda-stand-in-*/gpu_proof")
    found, refused = read_steps(folder, rehearsal=True)
    assert done.returncode == 0 and not refused, done.stdout[-3000:] + done.stderr[-2000:]
    billion, lora = found
    assert billion.figures["golden"].keys() >= {"cuda", "cpu"} and billion.protocol["num_gpus"] == 2
    assert "GPU and CPU differ by" in billion.verdict
    (rows,) = lora.figures["tables"].values()
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[0]["predicted GB"] > 0


def test_a_second_run_has_them_all(folder: Path, steps: dict[str, StepRecord]) -> None:
    again = rehearse(folder, "--only", ",".join(steps))
    assert again.stdout.count("ok (have it)") == len(steps) and again.returncode == 0
    found, _ = read_steps(folder / "results" / "processor" / "gpu_proof", rehearsal=True)
    assert {record.checksum for record in found} == {record.checksum for record in steps.values()}
