"""Limits of a job's time that are short, moved while the run trains, or close after a slow save: real runs."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from rm_scale.training.attempts import read_attempts
from rm_scale.training.preemption import END_FILE_SECONDS
from tests.support.gated_runs import GatedRun
from tests.support.launching import losses

pytestmark = pytest.mark.e2e

STEPS = 6
HELD_SECONDS = 10.0
"""The save at step 4 is held for so long, whatever the disk."""


def write_end(path: Path, seconds_left: float) -> float:
    """Say when the job ends, as the job's script does; give that time."""
    ends = time.time() + seconds_left
    path.with_suffix(".new").write_text(f"{ends:.0f}\n")
    path.with_suffix(".new").rename(path)
    return ends


def start(folder: Path, words: list[str], gates: tuple[int | str, ...], end: Path, first: int = 0) -> GatedRun:
    """An attempt that begins now, whose end stands in a file."""
    now, log = f"{time.time():.0f}", folder.with_suffix(".txt")
    return GatedRun(folder, words, gates, log, first=first, RM_SCALE_START_TIME=now, RM_SCALE_END_TIME_FILE=str(end))


def saved_steps(output: Path) -> list[int]:
    return [event["step"] for event in read_attempts(output / "run") if event["event"] == "saved"]


def test_limits_that_are_short_moved_and_close_after_a_slow_save(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output, end = tmp_path / "run", tmp_path / "end_time"
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--eval_split_size", "8"]
    words += ["--output_dir", str(output), "--per_device_train_batch_size", "4", "--max_steps", str(STEPS)]
    words += ["--logging_steps", "1", "--use_peft", "--disable_tqdm", "--sample_scores", "0"]
    words += ["--resume_from_checkpoint", "auto"]

    # A limit that leaves less than the minute which is otherwise the least margin, before the first step.
    run = start(tmp_path / "first", words, (0, 1, 4, "save"), end)
    run.at(0)
    first_end = write_end(end, 20)
    time.sleep(END_FILE_SECONDS)  # until then a look just before may be remembered
    run.go(0)
    run.at(1)
    # An administrator extends it, and the first limit passes.
    write_end(end, 86400)
    time.sleep(max(END_FILE_SECONDS, first_end - time.time()))
    run.go(1)
    pid = run.at(4)
    os.kill(pid, signal.SIGUSR1)
    run.go(4)
    run.at("save")
    time.sleep(HELD_SECONDS)
    run.go("save")
    assert run.end() == 85, run.text()[-6000:]
    assert saved_steps(output) == [4]
    assert "a save is expected to take" in run.text(), run.text()[-6000:]
    assert re.search(r"the job's end was moved: it is 2[34] h \d\d min later", run.text()), run.text()[-6000:]

    # The slow save is on record. The next attempt has made none, and a limit comes near that would otherwise do.
    run = start(tmp_path / "second", words, (5,), end, first=4)
    run.at(5)
    write_end(end, 2 * HELD_SECONDS)
    time.sleep(END_FILE_SECONDS)
    run.go(5)
    assert run.end() == 85, run.text()[-6000:]
    assert "(the slowest of the last saves): the run stops" in run.text()
    assert "asked to stop (wall clock): all ranks stop at step 5" in run.text()
    assert saved_steps(output) == [4, 5]
    assert len(losses(output)) == 5
