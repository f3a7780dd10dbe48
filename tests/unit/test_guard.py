"""The guard around entry points: who prints an error, exit codes, and how a process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest

from rm_scale import distributed
from rm_scale.distributed import raise_together
from rm_scale.errors import DataError
from rm_scale.guard import run_guarded


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from an environment without ranks: a run in this process before may have left its own."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def fail() -> int:
    raise DataError("a=1: must be 2. Fix: write 2.")


def test_users_errors_are_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(fail) == 2
    assert capsys.readouterr().err == "rm_scale: a=1: must be 2. Fix: write 2.\n"


def test_other_ranks_are_silent_and_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm_scale.guard.HEAD_START_SECONDS", 0.0)

    def fail_together() -> int:
        raise_together(DataError("a shared one"))
        return 0

    with mock.patch.dict(os.environ, {"RANK": "1"}):
        assert run_guarded(fail_together) == 2
        assert capsys.readouterr().err == ""
        assert run_guarded(fail) == 2, "what only this rank met, nobody else can tell"
        assert capsys.readouterr().err.startswith("rm_scale (rank 1): a=1")
    with mock.patch.dict(os.environ, {"RANK": "9", "LOCAL_RANK": "1"}):
        assert run_guarded(lambda: _raise(_met_by_node())) == 2
        assert capsys.readouterr().err == "", "local rank 0 of that machine speaks"
    with mock.patch.dict(os.environ, {"RANK": "8", "LOCAL_RANK": "0"}):
        assert run_guarded(lambda: _raise(_met_by_node())) == 2
        assert "rank 8" in capsys.readouterr().err
    assert run_guarded(fail, debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("gpus", ["own", "all"])
@pytest.mark.parametrize(("rank", "place", "printed"), [("0", "0", True), ("1", "1", False), ("3", "1", False)])
def test_one_slurm_task_of_a_node_prints_what_all_of_them_met(
    rank: str, place: str, gpus: str, printed: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `srun --gpus-per-task=1` LOCAL_RANK is 0 on every rank, once the ranks know their place."""
    monkeypatch.setattr("rm_scale.guard.HEAD_START_SECONDS", 0.0)
    step = {"SLURM_PROCID": rank, "SLURM_LOCALID": place, "SLURM_STEP_NUM_TASKS": "4", "MASTER_PORT": "1"}
    step |= {"SLURM_STEP_NODELIST": "here", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    monkeypatch.setattr(distributed, "_num_visible_gpus", lambda: 1 if gpus == "own" else 2)

    def fail_on_the_node() -> int:
        distributed.export_world(distributed.detect_world())
        assert os.environ["LOCAL_RANK"] == ("0" if gpus == "own" else place)
        return _raise(_met_by_node())

    with mock.patch.dict(os.environ, step):
        assert run_guarded(fail_on_the_node) == 2
    assert ("seen on this machine" in capsys.readouterr().err) is printed


def test_a_launcher_inside_a_slurm_task_names_the_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task a node, which starts that node's ranks: SLURM_LOCALID is 0 for all of them."""
    monkeypatch.setattr("rm_scale.guard.HEAD_START_SECONDS", 0.0)
    step = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "4"}
    for rank, local_rank, printed in (("2", "0", True), ("3", "1", False)):
        with mock.patch.dict(os.environ, {**step, "RANK": rank, "LOCAL_RANK": local_rank}):
            assert run_guarded(lambda: _raise(_met_by_node())) == 2
        assert bool(capsys.readouterr().err) is printed


def _met_by_node() -> DataError:
    error = DataError("seen on this machine")
    error.met_by = "node"
    return error


def _raise(error: Exception) -> int:
    raise error


def test_our_own_defects_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> int:
        raise KeyError("x")

    assert run_guarded(broken) == 1
    assert "KeyError: 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "expected"), [(0, "finished\n"), (3, "")])
def test_leaving_finishes_loggers_after_a_success_only(code: int, expected: str) -> None:
    """`print` is registered as a logger would register its last upload."""
    program = "import atexit, rm_scale.guard as g; atexit.register(print, 'finished')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}g.leave({code})"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, expected)


def test_interrupt_has_its_own_code() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_guarded(interrupted) == 130
