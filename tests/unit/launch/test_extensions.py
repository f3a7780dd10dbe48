"""Compiled operators: a folder for each environment, and locks that dead builds leave."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from rm_scale.launch.extensions import clear_stale_locks, prepare_extensions


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
