"""Which folder an export may take the place of: an empty one, or an earlier export with nothing added."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rm_scale.inference.export.export_card import BEGIN, CARD_FILE
from rm_scale.modeling.scoring_contract import CONTRACT_FILE
from rm_scale.output_paths import folder_problem, foreign_files

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


def _is_older_export(folder: Path) -> bool:
    """Return whether a version that kept no list of its files made this export: by its contract and its card."""
    try:
        card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return (folder / CONTRACT_FILE).is_file() and BEGIN in card and not (folder / "run").exists()
