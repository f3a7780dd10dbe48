"""The guard around entry points, the command line, and compiled operators."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from rm_scale.cli import main as cli
from rm_scale.distributed import raise_together
from rm_scale.errors import DataError
from rm_scale.launch.extensions import clear_stale_locks, prepare_extensions
from rm_scale.launch.guard import run_guarded


def fail() -> int:
    raise DataError("a=1: must be 2. Fix: write 2.")


def test_users_errors_are_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(fail) == 2
    assert capsys.readouterr().err == "rm_scale: a=1: must be 2. Fix: write 2.\n"


def test_other_ranks_are_silent_and_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm_scale.launch.guard.HEAD_START_SECONDS", 0.0)

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
    program = "import atexit, rm_scale.launch.guard as g; atexit.register(print, 'finished')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}g.leave({code})"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, expected)


def test_interrupt_has_its_own_code() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_guarded(interrupted) == 130


def test_help_is_quick_and_loads_no_torch() -> None:
    command = [
        sys.executable,
        "-c",
        "import sys, rm_scale.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n",
    ]
    command[-1] += "print('torch' in sys.modules)"
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "assets" in done.stdout
    assert time.perf_counter() - started < 30  # a hang, not a timing


def test_assets_tiny_makes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["assets", "tiny", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")


def test_data_reports_and_refuses(tiny_model: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["data", "--model_name_or_path", str(tiny_model)]
    assert cli([*common, "--dataset_path", str(pairs_file)]) == 0
    assert "120 used" in capsys.readouterr().err
    assert cli([*common, "--dataset_path", "gone.jsonl"]) == 2
    assert "gone.jsonl" in capsys.readouterr().err
    assert cli([*common, "--dataset_pth", "x"]) == 2
    assert "did you mean dataset_path" in capsys.readouterr().err


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(["assets", "tiny", "x", "--nonsense"])
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_only_old_locks_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "a" / "lock", tmp_path / "b" / "lock"
    for lock in (old, new):
        lock.parent.mkdir()
        lock.touch()
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert clear_stale_locks(tmp_path) == [old]
    assert new.exists() and not old.exists()


def test_environments_have_their_own_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(tmp_path)}):
        os.environ.pop("TORCH_EXTENSIONS_DIR", None)
        here = prepare_extensions(0)
        os.environ.pop("TORCH_EXTENSIONS_DIR")
        monkeypatch.setattr(sys, "prefix", "/elsewhere")
        assert prepare_extensions(0) != here
