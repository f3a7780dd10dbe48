"""Compiled operators: a folder for each environment, and locks that dead builds leave."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from rm_scale.launch.extensions import CACHES, clear_stale_locks, prepare_extensions


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


def in_a_job(folder: Path, **others: str) -> dict[str, str]:
    """The variables that slurm/common/software.sh sets."""
    root = folder / "rm_scale-1" / "caches"
    return {"RM_SCALE_CACHES": str(root), **{name: str(root / name.lower()) for name in CACHES}, **others}


def test_a_nodes_caches_are_made_for_this_user_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a user has set is neither made nor changed."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    with mock.patch.dict(os.environ, in_a_job(tmp_path, CUDA_CACHE_PATH="/mine")):
        operators = prepare_extensions(0)
        assert operators.is_relative_to(os.environ["RM_SCALE_CACHES"])
        made = [Path(os.environ[name]) for name in CACHES if name != "CUDA_CACHE_PATH"]
        assert {folder.stat().st_mode & 0o777 for folder in made} == {0o700}
        assert os.environ["CUDA_CACHE_PATH"] == "/mine" and not Path("/mine").exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_cache_that_is_not_ours_is_not_used(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Code from there would be run."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    (tmp_path / "theirs").mkdir()
    if kind == "link":
        (tmp_path / "rm_scale-1").symlink_to(tmp_path / "theirs")
    else:
        (tmp_path / "rm_scale-1").touch()
    with mock.patch.dict(os.environ, in_a_job(tmp_path)):
        operators = prepare_extensions(0)
        assert not operators.is_relative_to(tmp_path)
        assert not [name for name in ("RM_SCALE_CACHES", *CACHES) if name in os.environ]
