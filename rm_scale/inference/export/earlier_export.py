"""Which folder an export may take the place of, and how: an empty one, or an earlier export with nothing added."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rm_scale.errors import DiskError, ModelError
from rm_scale.files import write_problem
from rm_scale.inference.export.export_card import BEGIN, CARD_FILE
from rm_scale.modeling.scoring_contract import CONTRACT_FILE
from rm_scale.output_paths import folder_problem, foreign_files
from rm_scale.texts import one_line

_ADDED_LATER = ("model.onnx", "model.onnx.data")
"""What `--onnx` writes into an export that exists."""


def target_problem(target: Path, overwrite: bool, kept: Iterable[tuple[str, str | Path]]) -> str | None:
    """Return why an export can't go to `target`, with the fix; `None` when it can.

    Args:
        target: the folder of the new export.
        overwrite: an earlier export may be replaced.
        kept: what must not be in it, and what each is called: the source and its base model.
    """
    name = f"output={target}"
    if not target.resolve().parent.is_dir():
        return f"{name}: there is no folder {target.parent}. Fix: make it first."
    refused = write_problem(target.resolve().parent)
    if refused is not None:
        return f"{name}: nothing can be written in {target.parent} ({refused}). Fix: another --output."
    if not target.exists():
        return None
    problem = folder_problem(name, target, kept)
    if problem is not None:
        return problem
    if target.is_dir() and not any(target.iterdir()):
        return None
    if not overwrite:
        return f"{name}: exists. Fix: --overwrite, or another --output."
    return _foreign_problem(name, target)


def _foreign_problem(name: str, target: Path) -> str | None:
    """Return why a folder that is not empty is no earlier export, or what somebody added to one."""
    if not target.is_dir():
        return f"{name}: is a file, not an earlier export. Fix: another --output."
    foreign = foreign_files(target)
    if foreign is None:
        if _is_older_export(target):
            return None
        return f"{name}: is no earlier export, so --overwrite does not replace it. Fix: another --output."
    added = [file for file in foreign if file not in _ADDED_LATER]
    if added:
        return (
            f"{name}: is an earlier export, but {added[0]}{f' and {len(added) - 1} more' if added[1:] else ''} in it "
            "did not come from us; nothing is replaced. Fix: move it away, or another --output."
        )
    return None


def take_place(partial: Path, target: Path, overwrite: bool, kept: Iterable[tuple[str, str | Path]]) -> None:
    """Give a finished export its name, by one rename; `target` is looked at once more, since an export takes its time.

    Args:
        partial: the export under its temporary name, beside the target.
        target, overwrite, kept: see `target_problem`.

    Raises:
        ModelError: something that is not replaced has been put there meanwhile; it stays as it is.
    """
    problem = target_problem(target, overwrite, kept)
    if problem is None and not (target.is_dir() and any(target.iterdir())):
        try:
            os.replace(partial, target)  # the system puts it in the place of an empty folder, and of nothing else
        except OSError as error:
            if error.errno not in _IN_THE_WAY:
                raise
            problem = f"output={target}: exists. Fix: another --output."
        else:
            return
    old = target.parent / f".{target.name}.replaced-{os.getpid()}"
    if problem is None:
        os.replace(target, old)
        problem = _foreign_problem(f"output={target}", old)  # now nobody puts anything into it by its name
        try:
            if problem is None:
                os.replace(partial, target)
        finally:
            if not target.exists():
                os.replace(old, target)
    if problem is not None:
        raise ModelError(f"{problem} It was put there while the export ran; what was exported has been removed.")
    shutil.rmtree(old, ignore_errors=True)


_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_BY_SAFETENSORS = re.compile(rf"os error ({'|'.join(map(str, _FULL_DISK))})\b")


@contextmanager
def full_disk_named(target: Path) -> Iterator[None]:
    """Turn the error of a full disk, which may name no file, into one that names the export.

    Raises:
        DiskError: the block met a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number not in _FULL_DISK and not (number is None and _BY_SAFETENSORS.search(str(error))):
            raise
        raise DiskError(
            f"output={target}: could not be written ({one_line(error, 200)}). What was written has been removed. "
            "Fix: free disk space, --dtype bfloat16, or another disk."
        ) from error


def _is_older_export(folder: Path) -> bool:
    """Return whether a version that kept no list of its files made this export: by its contract and its card."""
    try:
        card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return (folder / CONTRACT_FILE).is_file() and BEGIN in card and not (folder / "run").exists()
