"""The save that a run ends with, and what else a failing disk may do to a save, on real small disks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from rm_scale.errors import CheckpointError, DiskError
from rm_scale.training.attempts import Attempt, read_attempts
from rm_scale.training.checkpoint.last_save import end_with_requeue, give_up, insist, next_pause
from rm_scale.training.checkpoint.manifest import Manifest, read_manifest, write_manifest
from rm_scale.training.checkpoint.publish import publish, rotate, writing
from rm_scale.training.checkpoint.reload_check import disk_errors_explained
from tests.support.launching import REPOSITORY
from tests.support.small_disks import small_disk

EMPTY = Manifest(1, 1, 0, True, True, 1, {}, {})


def sealed(folder: Path, step: int, attempt: int = 1) -> Path:
    folder.mkdir(parents=True)
    write_manifest(folder, replace(EMPTY, step=step, attempt=attempt))
    return folder


def pauses(save_seconds: float, left: float | None) -> list[float]:
    """The pauses of a save that always fails at once."""
    found: list[float] = []
    while pause := next_pause(len(found) + 1, sum(found), save_seconds, None if left is None else left - sum(found)):
        found.append(pause)
    return found


def test_pauses_grow_and_fit_into_the_time_that_is_left() -> None:
    assert pauses(5, None) == [2, 4, 8, 16, 30], "about a minute when nobody knows"
    assert pauses(5, 11) == []
    assert pauses(5, 30) == [2, 4, 8], "a save and ten seconds are left after the last"
    assert pauses(100, 30) == []
    assert sum(pauses(5, 10**6)) == 300, "all nodes wait meanwhile"
    assert pauses(5, -3.0) == []


def test_a_save_is_tried_until_it_succeeds_or_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def write() -> int:
        tries.append(len(tries))
        with writing(tmp_path):
            (tmp_path / "there" / "file").write_text("x")  # no such folder before it is made
        return len(tries)

    def beat(place: str) -> None:
        (tmp_path / "there").mkdir(exist_ok=True)

    assert insist(write, "checkpoint-1", 0.0, beat) == 2
    monkeypatch.setenv("RM_SCALE_END_TIME", "1000")
    (tmp_path / "there" / "file").unlink()
    (tmp_path / "there").rmdir()
    with pytest.raises(DiskError, match="No such file"):
        insist(write, "checkpoint-1", 0.0, beat)
    assert len(tries) == 3


def test_what_is_lost_is_said_and_recorded(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, is_main=True)
    attempt.begin()
    with attempt.recorded():
        failed = give_up("checkpoint-9", DiskError("full."), 9, 4)
        assert end_with_requeue(failed, attempt) == 85
    assert "5 steps are lost: the run ends at step 9 and goes on from checkpoint-4" in str(failed)
    assert read_attempts(tmp_path)[-1]["reason"].startswith("stopped: checkpoint-9 could not be written")


def test_an_old_checkpoint_that_can_not_be_removed_ends_no_run(tmp_path: Path) -> None:
    """A mounted folder can't be renamed, whoever asks; the next rotation tries again."""
    for step in (2, 3):
        sealed(tmp_path / f"checkpoint-{step}", step)
    with small_disk(tmp_path / "checkpoint-1", "64k") as busy:
        write_manifest(busy.path, EMPTY)
        rotate(tmp_path, 1, None)
        assert (tmp_path / "checkpoint-1").is_dir() and (tmp_path / "checkpoint-3").is_dir()
    write_manifest(tmp_path / "checkpoint-1", EMPTY)
    rotate(tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_checkpoint_of_that_name_stays_when_the_new_one_can_not_be_published(tmp_path: Path) -> None:
    sealed(tmp_path / "checkpoint-3", 3, attempt=1)
    with pytest.raises(DiskError):
        publish(tmp_path / ".tmp-checkpoint-gone", tmp_path / "checkpoint-3")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert read_manifest(tmp_path / "checkpoint-3").attempt == 1
    publish(sealed(tmp_path / ".tmp-checkpoint-new", 3, attempt=2), tmp_path / "checkpoint-3")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert read_manifest(tmp_path / "checkpoint-3").attempt == 2


def test_libraries_written_in_rust_say_in_their_own_way_that_the_disk_is_full(tmp_path: Path) -> None:
    """tokenizers raises an `Exception` of no class; it must not pass for a defect."""
    words = Tokenizer(models.WordLevel({f"word{number}": number for number in range(20_000)}, unk_token="word0"))
    with small_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(DiskError, match="No space left on device"), disk_errors_explained(disk.path):
            words.save(str(disk.path / "tokenizer.json"))
        with pytest.raises(DiskError, match="No space left on device"), writing(disk.path):
            words.save(str(disk.path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="mine"), writing(tmp_path):
        raise CheckpointError("mine")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("a defect")


def test_a_hang_report_that_can_not_be_written_goes_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file is in the way")
    code = (
        "import sys; from pathlib import Path; from rm_scale.training.watchdog import Watchdog\n"
        "dog = Watchdog(Path(sys.argv[1]), 0, 1, 10.0, 1, lambda: False, print)\n"
        "dog.beat('micro-batch 1 of 2', 7)\n"
        "dog.report_and_leave('nothing has moved')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "rank 0 stands at " in done.stderr and "in micro-batch 1 of 2, step 7; its report can't be" in done.stderr
    assert "most recent call first" in done.stderr and 'File "<string>", line 4' in done.stderr
