"""Errors travel between ranks and arrive as they were."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from rm_scale import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_survive_the_way_to_another_rank(kind: type[errors.UserError]) -> None:
    error = errors.ConfigError(["a=1: bad.", "b=2: worse."]) if kind is errors.ConfigError else kind("a=1: bad.")
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived)) == (kind, str(error))


def fault_of(action: object) -> str | None:
    """Return what `system_fault` says of the error that a call raises."""
    assert callable(action)
    try:
        action()
    except Exception as error:
        return errors.system_fault(error)
    raise AssertionError("nothing was refused")


def test_paths_that_the_system_refuses(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "is not there, and can't be made there. Fix:" in str(fault_of(lambda: Path("/proc/x.jsonl").write_text("a")))
    assert f"{file}: is there already. Fix:" in str(fault_of(file.mkdir))
    assert "holds a NUL" in str(fault_of(lambda: Path("a\0b").read_text()))
    assert "holds a NUL" in str(fault_of(lambda: os.stat("a\0b")))
    assert "begins with ~" in str(fault_of(lambda: Path("~nosuch/a").expanduser()))


def test_what_names_no_file_stays_a_defect() -> None:
    for error in (OSError(errno.ENOENT, "no such thing"), ValueError("a"), RuntimeError("b")):
        assert errors.system_fault(error) is None
