"""Disks that fill up or become read-only while a run trains: real file systems and runs, one process and two ranks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rm_scale.training.attempts import read_attempts
from rm_scale.training.checkpoint.manifest import newest_valid
from rm_scale.training.run_warnings import read_warnings
from tests.support.gated_runs import GatedRun as Run
from tests.support.launching import read_lines
from tests.support.small_disks import SmallDisk, small_disk

pytestmark = pytest.mark.e2e

STEPS = 8


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """The disk of `output_dir`."""
    with small_disk(tmp_path / "outputs", "24m") as made:
        yield made


@pytest.fixture
def log_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "logs", "1m") as made:
        yield made


@pytest.fixture
def settings(tiny_model: Path, pairs_file: Path, disk: SmallDisk) -> list[str]:
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--eval_split_size", "8"]
    words += ["--output_dir", str(disk.path / "run"), "--per_device_train_batch_size", "4", "--max_steps", str(STEPS)]
    words += ["--logging_steps", "1", "--learning_rate", "3e-3", "--use_peft", "--disable_tqdm", "--sample_scores", "0"]
    return [*words, "--resume_from_checkpoint", "auto"]


def logged_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / "run" / "metrics.jsonl") if "loss" in line]


def test_nothing_between_saves_ends_or_blocks_a_run(
    settings: list[str], disk: SmallDisk, log_disk: SmallDisk, tmp_path: Path
) -> None:
    """Full disks of outputs, log and TensorBoard in steps 3 to 20, a read-only one in steps 22 and 23.

    A file may grow to the end of its last page on a full disk, hence the number of steps.
    """
    board = log_disk.path / "board"
    words = [*settings, "--report_to", "tensorboard", "--max_steps", "24"]
    log = log_disk.path / "log.txt"
    run = Run(tmp_path / "gates", words, (2, 20, 21, 23), log, TENSORBOARD_LOGGING_DIR=str(board))
    folder = disk.path / "run"
    run.at(2)
    disk.fill()
    log_disk.fill(log)
    run.go(2)
    run.at(20)
    there = len(logged_steps(folder))
    assert logged_steps(folder) == list(range(1, there + 1)) and there < 19, "lines are whole, and some wait"
    disk.empty()
    log_disk.empty()
    run.go(20)
    run.at(21)
    assert logged_steps(folder) == list(range(1, 21)), "they come out with the next line"
    disk.remount("ro")
    run.go(21)
    run.at(23)
    disk.remount("rw")
    run.go(23)
    assert run.end() == 0, run.text()[-6000:]
    assert logged_steps(folder) == [line["step"] for line in read_lines(folder / "run" / "steps.jsonl")]
    assert logged_steps(folder) == list(range(1, 25))
    assert json.loads((folder / "run" / "plan_check.json").read_text())["measured"]
    assert "peak_memory" in json.loads((folder / "run" / "timing.json").read_text())
    said = [text for _, text in read_warnings(folder / "run")]
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert any(name in text and "can't be written" in text for text in said), said
        assert any(name in text and "none is lost" in text for text in said), said
    assert any("TensorBoardCallback: can't write" in text for text in said), said
    assert any("TensorBoardCallback: can write again" in text for text in said), said
    assert "of this log could not be written and" in run.text() and "No space left on device" in run.text()
    assert "24 of 24 steps" in run.text(), "the log goes on"


def test_a_last_save_is_tried_again_by_all_ranks(settings: list[str], disk: SmallDisk, tmp_path: Path) -> None:
    """Two ranks are asked to stop while the disk is full; when there is room the checkpoint is written: exit code 85.

    No attempt of the run has published a checkpoint before.
    """
    words = [*settings, "--deepspeed", "zero2", "--ddp_timeout", "120"]
    run = Run(tmp_path / "gates", words, (3,), tmp_path / "log.txt", ranks=2)
    rank = run.at(3)
    disk.fill()
    os.kill(rank, signal.SIGUSR1)
    run.go(3)
    run.wait_for(lambda: "next try in" in run.text(), "the first failed save")
    disk.empty()
    assert run.end() == 85, run.text()[-6000:]
    folder = disk.path / "run"
    assert newest_valid(folder, 0, 1) == folder / "checkpoint-3"
    assert logged_steps(folder) == [1, 2, 3]
    assert not list(folder.glob(".tmp-*"))
    assert read_attempts(folder / "run")[-1]["reason"] == "stopped: SIGUSR1"


def test_a_run_whose_last_save_fails_goes_on_from_its_last_checkpoint(
    settings: list[str], disk: SmallDisk, tmp_path: Path
) -> None:
    """At a stop, then at the end of training; an attempt that has published nothing itself ends with 2."""
    words = [*settings, "--save_strategy", "steps", "--save_steps", "2", "--stop_margin_seconds", "0"]
    folder = disk.path / "run"
    run = Run(tmp_path / "first", words, (3,), tmp_path / "first.txt")
    rank = run.at(3)
    disk.fill()
    os.kill(rank, signal.SIGUSR1)
    run.go(3, seconds_left=11)  # too little for another try, and none is needed
    assert run.end() == 85, run.text()[-6000:]
    assert "1 step is lost: the run ends at step 3 and goes on from checkpoint-2" in run.text()
    disk.empty()
    assert newest_valid(folder, 0, 1) == folder / "checkpoint-2"

    run = Run(tmp_path / "second", words, (STEPS,), tmp_path / "second.txt", first=2)
    run.at(STEPS)
    disk.remount("ro")
    run.go(STEPS, seconds_left=11)
    assert run.end() == 85, run.text()[-6000:]
    assert f"2 steps are lost: the run ends at step {STEPS} and goes on from checkpoint-6" in run.text()
    disk.remount("rw")
    assert newest_valid(folder, 0, 1) == folder / "checkpoint-6"

    run = Run(tmp_path / "third", [*words, "--save_steps", "100"], (7,), tmp_path / "third.txt", first=6)
    rank = run.at(7)
    disk.fill()
    os.kill(rank, signal.SIGUSR1)
    run.go(7, seconds_left=11)
    assert run.end() == 2, run.text()[-6000:]
    assert "checkpoint-7 could not be written, and the run was to stop with it" in run.text()
    disk.empty()
    assert newest_valid(folder, 0, 1) == folder / "checkpoint-6"
    assert logged_steps(folder)[:6] == [1, 2, 3, 4, 5, 6]
