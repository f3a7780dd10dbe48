"""The driver of the GPU proof with real processes: limits, children, budget, resumption, records, the table."""

from __future__ import annotations

import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu_proof import driver
from benchmarks.gpu_proof import record as records
from benchmarks.gpu_proof.driver import Options, Proof, code_digest, machine_name
from benchmarks.gpu_proof.plan import Step
from benchmarks.gpu_proof.processes import MARK, end_all, marked
from benchmarks.gpu_proof.record import StepRecord, read_step, read_steps, without_places, write_step
from rm_scale.reporting.benchmarks.sealed_records import RecordError, read_records

BEGIN = """
import json, os, pathlib, subprocess, sys, time
settings = json.load(open(sys.argv[1]))
work, results = pathlib.Path(settings["work"]), pathlib.Path(settings["results"])
results.mkdir(parents=True, exist_ok=True)

def answer(status="ok", reason="", verdict="", **figures):
    aside = work / "aside"
    aside.write_text(json.dumps({"status": status, "reason": reason, "verdict": verdict, "figures": figures}))
    os.replace(aside, work / "answer.json")
"""
GOOD = "answer(verdict='all of it', number=1)"
COUNTED = f"(results.parent / 'starts').open('a').write('x'); {GOOD}"


class Scripted(Proof):
    """The driver with short scripts for steps."""

    scripts: dict[str, str]

    def command(self, settings: Path) -> list[str]:
        name = json.loads(settings.read_text())["step"]
        return [sys.executable, "-c", BEGIN + self.scripts[name], str(settings)]

    def _start_assets(self) -> None:
        """None of the scripts needs a model."""


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run scripts by name; a step's limit is 300 s unless given in `limits`."""

    def one(scripts: dict[str, str], limits: dict[str, float] | None = None, code: str = "here", **more: Any) -> int:
        steps = tuple(
            Step(name, f"title of {name}", (limits or {}).get(name, 300.0), 0.0, more.pop(f"needs_{name}", ()))
            for name in scripts
        )
        plain: dict[str, Any] = {
            "minutes": 30.0,
            "started": time.time(),
            "only": (),
            "again": (),
            "rehearse": False,
            "device": "cuda",
            "results": tmp_path / "results",
            "scratch": tmp_path / "scratch",
            "archive": None,
            "jobs": 1,
            "keep": False,
            "commit": "abc",
            "machine": {"gpus": ["NVIDIA Test 1000"], "memory": [8e10], "torch": "2.0"},
            "bitsandbytes": True,
            "steps": steps,
        }
        proof = Scripted(Options(**{**plain, **more}))
        proof.scripts, proof.code = scripts, code
        return proof.run()

    return one


def of(tmp_path: Path, name: str) -> StepRecord:
    found, refused = read_steps(tmp_path / "results" / "nvidia-test-1000" / "gpu_proof")
    assert not refused
    return next(record for record in found if record.name == name)


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def over_time_once_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's time is up as soon as it has something on record, however slow the machine is."""

    def seconds(running: driver.Running) -> float:
        return 1e12 if running.answered else 0.0

    monkeypatch.setattr(driver.Running, "seconds", property(seconds))


@pytest.mark.usefixtures("over_time_once_answered")
def test_a_step_over_its_limit_is_ended_with_everything_it_has_started(run: Run, tmp_path: Path) -> None:
    """A child in a session of its own, that child's child, and one that is stopped: no process group holds them all."""
    hanging = """
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
nested = [sys.executable, "-c", f"import subprocess; subprocess.run({sleep!r})"]
children = [subprocess.Popen(sleep, start_new_session=True), subprocess.Popen(nested, start_new_session=True)]
stopped = subprocess.Popen(sleep)
os.kill(stopped.pid, 19)
answer("unfinished", verdict="as far as it got", mark=os.environ["RM_SCALE_GPU_PROOF_STEP"],
       pids=[os.getpid(), stopped.pid, *(child.pid for child in children)])
time.sleep(600)
"""
    assert run({"hangs": hanging}, {"hangs": 4.0}) == 1
    record = of(tmp_path, "hangs")
    assert record.status == "killed" and record.reason.startswith("not done after 4 s (")
    assert record.verdict == "as far as it got", "what it knew is kept"
    assert len(record.figures["pids"]) == 4 and not any(lives(pid) for pid in record.figures["pids"])
    assert not list(marked(record.figures["mark"])), "nor their children"
    assert not any((tmp_path / "scratch").iterdir()), "models and runs are taken away"


def test_what_a_step_knows_is_on_disk_before_it_ends(run: Run, tmp_path: Path) -> None:
    looks = """
answer("unfinished", verdict="one figure", first=1)
record = results / "gpu_proof" / "steps.jsonl"
while not record.exists():
    time.sleep(0.05)
answer(seen=json.loads(record.read_text()))
"""
    assert run({"looks": looks}) == 0
    seen = of(tmp_path, "looks").figures["seen"]
    assert (seen["status"], seen["verdict"], seen["figures"]) == ("unfinished", "one figure", {"first": 1})
    assert seen["checksum"].startswith("sha256:")


def test_a_second_run_skips_what_has_a_record_of_the_same_code(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {"good": COUNTED, "bad": COUNTED.replace("answer(", "answer('failed', 'a reason', ")}
    starts = tmp_path / "results" / "starts"
    assert run(scripts) == 1 and len(starts.read_text()) == 2
    assert run(scripts) == 1 and len(starts.read_text()) == 2, "a failure counts as long as the code is the same"
    assert "failed (have it)" in capsys.readouterr().out
    assert run(scripts, again=("good",)) == 1 and len(starts.read_text()) == 3
    assert run(scripts, again=("failed",)) == 1 and len(starts.read_text()) == 4
    assert run(scripts, again=("all",)) == 1 and len(starts.read_text()) == 6
    assert run(scripts, code="other") == 1 and len(starts.read_text()) == 8
    assert run(scripts, code="other", only=("good",)) == 0, "only what was asked for counts"


def test_an_edited_record_does_not_count(run: Run, tmp_path: Path) -> None:
    assert run({"good": COUNTED}) == 0
    folder = tmp_path / "results" / "nvidia-test-1000" / "gpu_proof"
    file = folder / "steps.jsonl"
    file.write_text(file.read_text().replace('"number":1', '"number":2', 1).replace("all of it", "more than all"))
    with pytest.raises(RecordError, match="the checksum does not fit the content"):
        read_step("good", folder)
    assert run({"good": COUNTED}) == 0 and len((tmp_path / "results" / "starts").read_text()) == 2


def test_a_step_that_does_not_fit_into_the_budget_is_skipped_and_said_so(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run({"first": GOOD}) == 0
    monkeypatch.setattr(driver, "RESERVE_SECONDS", 1e6)
    assert run({"first": GOOD, "second": GOOD}) == 0, "what is skipped has not failed"
    record = of(tmp_path, "second")
    assert record.status == "skipped" and "0 s left of 30 minutes" in record.reason
    assert "0 s left of 30 minutes" in capsys.readouterr().out
    assert run({"first": GOOD, "second": GOOD}, code="other") == 1, "nothing of this code has been shown"
    assert of(tmp_path, "first").status == "ok" and "its earlier record stays" in capsys.readouterr().out
    monkeypatch.undo()
    assert run({"first": GOOD, "second": GOOD}) == 0 and of(tmp_path, "second").status == "ok", "now there is time"


@pytest.mark.usefixtures("over_time_once_answered")
def test_a_step_that_the_budget_cuts_off_is_run_again(run: Run, tmp_path: Path) -> None:
    scripts = {"slow": "answer('unfinished', known=1); time.sleep(600)", "next": "answer()"}
    assert run(scripts, {"slow": 1e9}) == 1
    record = of(tmp_path, "slow")
    assert record.status == "unfinished" and record.figures == {"known": 1}
    assert "the 30 minutes were over" in record.reason and record.limit_seconds < 30 * 60
    assert of(tmp_path, "next").status == "ok", "whatever came of it, the next step runs"
    assert run({"slow": "answer()", "next": "answer()"}) == 0 and of(tmp_path, "slow").status == "ok"


def test_a_step_that_dies_has_failed_with_its_last_words(run: Run, tmp_path: Path) -> None:
    scripts = {
        "crashes": "raise ValueError('no such thing')",
        "lies": "answer(); sys.exit(3)",
        "vanishes": "answer('unfinished', part=1); sys.stdout.flush(); os.kill(os.getpid(), 9)",
    }
    assert run(scripts) == 1
    assert "ValueError: no such thing" in of(tmp_path, "crashes").reason
    assert of(tmp_path, "lies").reason.startswith("its process ended with code 3")
    assert of(tmp_path, "vanishes").status == "failed" and of(tmp_path, "vanishes").figures == {"part": 1}
    logs = tmp_path / "results" / "nvidia-test-1000" / "gpu_proof" / "logs" / "crashes.txt"
    assert "no such thing" in logs.read_text(), "the machine may be gone: the log stays"


def test_the_end_of_the_proof_ends_its_step(run: Run, tmp_path: Path) -> None:
    ends = """
answer("unfinished", pid=os.getpid())
while not (results / "gpu_proof" / "steps.jsonl").exists():
    time.sleep(0.05)
os.kill(os.getppid(), 15)
time.sleep(600)
"""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run({"ends": ends, "next": GOOD})
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
    record = of(tmp_path, "ends")
    assert record.status == "unfinished" and not lives(record.figures["pid"])


def test_steps_whose_needs_are_not_met_are_skipped(run: Run, tmp_path: Path) -> None:
    scripts = {"plain": GOOD, "four_bits": GOOD, "ranks": GOOD}
    needs: dict[str, Any] = {"needs_four_bits": ("bitsandbytes",), "needs_ranks": ("gpus",)}
    assert run(scripts, bitsandbytes=False, **needs) == 0
    assert "no wheel of it was carried along" in of(tmp_path, "four_bits").reason
    assert of(tmp_path, "ranks").reason == "needs two GPUs or more"
    two = {"gpus": ["NVIDIA Test 1000"] * 2, "memory": [8e10] * 2, "torch": "2.0"}
    shows = "answer(seen=os.environ.get('CUDA_VISIBLE_DEVICES'), gpus=settings['num_gpus'])"
    assert run({**scripts, "ranks": shows, "plain": shows}, machine=two, again=("all",), **needs) == 0
    assert of(tmp_path, "plain").figures == {"seen": "0", "gpus": 1}, "one process sees one GPU"


def test_a_rehearsal_has_records_of_its_own_kind(run: Run, tmp_path: Path) -> None:
    assert run({"good": GOOD}, rehearse=True, device="cpu") == 0
    folder = tmp_path / "results" / "processor" / "gpu_proof"
    assert read_step("good", folder, rehearsal=True).schema_name == records.REHEARSAL
    with pytest.raises(RecordError, match="is of a rehearsal at small sizes, and no measurement"):
        read_step("good", folder)
    assert "nothing here is a measurement" in (folder / "summary.md").read_text()
    assert run({"good": GOOD}) == 0
    real = tmp_path / "results" / "nvidia-test-1000" / "gpu_proof"
    with (real / "steps.jsonl").open("a") as stream:
        stream.write((folder / "steps.jsonl").read_text())
    found, refused = read_steps(real)
    assert [record.name for record in found] == ["good"] and len(refused) == 1
    assert refused[0].startswith(f"{real / 'steps.jsonl'} line 2: ")
    assert run({"good": GOOD}) == 1, "a table with a stranger in it is not sound"
    assert "Refused: " in (real / "summary.md").read_text()


def test_the_benchmark_report_passes_these_records_over(run: Run, tmp_path: Path) -> None:
    run({"good": GOOD})
    found = read_records([tmp_path / "results"])
    assert found.records == () and found.refused == ()


def test_the_table_and_the_archive(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = "answer(verdict='3 | 4', tables={'kernels': [{'name': 'a|b', 'ms': 1.23456, 'off': None}]})"
    archive = tmp_path / "back" / "proof.tar.gz"
    assert run({"bad": "answer('failed', 'why', verdict='known')", "good": table}, archive=archive) == 1
    said = capsys.readouterr().out
    assert "| 1 | title of bad | failed |" in said and "| why; known |" in said and "| 3 / 4 |" in said
    assert "**title of good: kernels**" in said and "| a/b | 1.235 | - |" in said
    assert "[" in said.splitlines()[0] and " bad " in said.splitlines()[0], "a line as each step ends"
    with tarfile.open(archive) as content:
        names = content.getnames()
    assert "nvidia-test-1000/gpu_proof/steps.jsonl" in names and "nvidia-test-1000/gpu_proof/summary.md" in names
    run({"bad": GOOD, "good": GOOD}, code="other", only=("bad",))
    assert "| 2 | title of good | ok (other code) |" in capsys.readouterr().out


def test_several_steps_at_a_time(run: Run, tmp_path: Path) -> None:
    """Each waits for the other's record, so one at a time would never end."""
    waits = """
answer("unfinished", begun=1)
file = results / "gpu_proof" / "steps.jsonl"
while not file.exists() or '"name":"{}"' not in file.read_text():
    time.sleep(0.05)
answer(seen=1)
"""
    scripts = {"a": waits.format("b"), "b": waits.format("a")}
    assert run(scripts, rehearse=True, device="cpu", jobs=2) == 0


def made(**more: Any) -> StepRecord:
    plain: dict[str, Any] = {
        "schema": records.SCHEMA,
        "name": "a",
        "number": 1,
        "title": "t",
        "status": "ok",
        "code": "c",
    }
    return StepRecord.model_validate({**plain, **more})


def test_a_record_is_sealed_and_verifies(tmp_path: Path) -> None:
    path = write_step(made(figures={"x": [1.5, None]}), tmp_path)
    found = read_step("a", tmp_path)
    assert found.figures == {"x": [1.5, None]} and found.checksum == found.sealed().checksum
    for content, text in (("{", "line 1: can't be read as JSON"), ('{"schema": "x/1", "name": "a"}', "schema 'x/1'")):
        path.write_text(content)
        _, (reason,) = read_steps(tmp_path)
        assert text in reason
        with pytest.raises(RecordError, match=r"no record of a|schema 'x/1'"):
            read_step("a", tmp_path)
    path.unlink()
    path = write_step(made(), tmp_path)
    content = json.loads(path.read_text())
    content["checksum"] = records.checksum({**content, "further": 1})
    path.write_text(json.dumps({**content, "further": 1}))
    with pytest.raises(RecordError, match="further: Extra inputs are not permitted"):
        read_step("a", tmp_path)


def test_a_step_that_is_written_again_takes_its_own_line(tmp_path: Path) -> None:
    write_step(made(name="a", status="unfinished"), tmp_path)
    write_step(made(name="b", number=2), tmp_path)
    path = write_step(made(name="a", verdict="done"), tmp_path)
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b"]
    assert read_step("a", tmp_path).verdict == "done" and read_steps(tmp_path)[1] == []


def test_records_hold_no_folder_and_no_nan() -> None:
    value = {"a": ["/somewhere/scratch/x/y.txt", float("nan"), float("inf")], "b": (1, "see /home/me/z and a/b", 2.5)}
    clean = without_places(value, {"/somewhere/scratch": "WORK"})
    assert clean == {"a": ["WORK/x/y.txt", "nan", "inf"], "b": [1, "see .../z and a/b", 2.5]}
    assert without_places("/proc/meminfo, /dev/shm/models/x, 1/2", {}) == "/proc/meminfo, .../x, 1/2"
    json.dumps(clean, allow_nan=False)


def test_the_digest_is_of_the_code_alone(tmp_path: Path) -> None:
    file = tmp_path / "rm_scale" / "train.py"
    file.parent.mkdir()
    file.write_text("a = 1\n")
    first = code_digest(tmp_path)
    (tmp_path / "README.md").write_text("words\n")
    assert code_digest(tmp_path) == first, "results and words change no code"
    file.write_text("a = 2\n")
    assert code_digest(tmp_path) != first and len(first) == 16


def test_names_of_machines() -> None:
    assert machine_name("NVIDIA H200") == "nvidia-h200"
    assert machine_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


def test_this_process_is_never_ended() -> None:
    os.environ[MARK] = "mark-of-this-test"
    try:
        assert end_all("mark-of-this-test") == 0
    finally:
        del os.environ[MARK]
