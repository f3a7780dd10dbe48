"""What a command may write over: nothing that we did not write, and nothing that it reads.

Standard library only, so that a wrong name is refused before anything is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from rm_scale.errors import UserError
from rm_scale.files import read_json_object, user_path, write_problem, write_whole
from rm_scale.version import __version__

# --- Files -----------------------------------------------------------------------------------------------------------

PAGE_MARK = '<meta name="generator" content="rm_scale">'
"""In the head of every page that we write: it tells our own earlier page from anything else under its name."""
_MARK_WITHIN_BYTES = 1024


def is_our_page(path: Path) -> bool:
    """Return whether a file is a page of ours, by its first bytes."""
    try:
        with path.open("rb") as file:
            return PAGE_MARK.encode() in file.read(_MARK_WITHIN_BYTES)
    except OSError:
        return False


def file_problem(
    name: str,
    path: str | Path,
    *,
    overwrite: bool,
    read: Iterable[str | Path] = (),
    ours: Callable[[Path], bool] | None = None,
) -> str | None:
    """Return why a file can't be written, with the fix; `None` when it can.

    Args:
        name: how the message begins, such as "output=scores.jsonl".
        path: the file.
        overwrite: the user asked for it to be replaced.
        read: files and folders that the command reads. They are never written over, even when asked: a file that is
            in one of these folders already is part of a model or a run. See `all_that_is_read`.
        ours: tells a file that may be replaced without being asked, wherever it lies: our own earlier one.
    """
    try:
        path = user_path(path)
    except UserError as error:
        return str(error)
    if path.is_dir():
        return f"{name}: is a folder. Fix: give a file's name."
    above = next(place for place in path.absolute().parents if os.path.exists(place))
    if above.is_file():
        return f"{name}: {above} is a file, not a folder. Fix: correct the path."
    if not path.absolute().parent.is_dir():
        return f"{name}: its folder does not exist. Fix: mkdir -p {path.parent}"
    refused = write_problem(path.parent)
    if refused is not None:
        return f"{name}: nothing can be written in {path.parent} ({refused}). Fix: another folder."
    if not os.path.lexists(path):
        return None
    if path.exists() and not path.is_file():
        return f"{name}: is a device or a pipe, not a file. Fix: another name."
    if ours is not None and ours(path):
        return None
    for place in all_that_is_read(read):
        if is_within(path, place):
            what = f"is a file of {place}, which is read here" if place.is_dir() else "is the input"
            return f"{name}: {what}; it is not written over. Fix: another name."
    return None if overwrite else f"{name}: exists. Fix: another name, or --overwrite."


def all_that_is_read(given: Iterable[str | Path]) -> list[Path]:
    """Return files and folders that are named, and what belongs to each.

    The records, a checkpoint or the merged model of a run stand for all of the run, an adapter also for its base.
    """
    found: list[Path] = []
    waiting = [user_path(place) for place in given]
    while waiting:
        place = waiting.pop(0)
        if place not in found:
            found.append(place)
            waiting += _belonging_to(place)
    return found


_CHECKPOINT = r"(unverified-)?checkpoint-\d+|later-checkpoint-\d+-[0-9a-f]{8}"
_PART_OF_A_RUN = re.compile(rf"run|merged|{_CHECKPOINT}")
_NAMES_A_BASE = (("adapter_config.json", "base_model_name_or_path"), ("scoring_contract.json", "base_model"))


def _belonging_to(folder: Path) -> list[Path]:
    """Return the run whose part a folder is, and the local base of the adapter that it holds."""
    if not folder.is_dir():
        return []
    real = folder.resolve()
    found = [real.parent] if _PART_OF_A_RUN.fullmatch(real.name) and _is_run(real.parent) else []
    if (folder / "adapter_config.json").is_file():
        for file, key in _NAMES_A_BASE:
            base = read_json_object(folder / file).get(key)
            name = base.get("name") if isinstance(base, dict) else base
            if isinstance(name, str) and name and Path(name).expanduser().is_dir():
                found.append(Path(name).expanduser())
    return found


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a run's output directory: it holds the run's records, or a model with its contract."""
    return (folder / "run" / "run_config.yaml").is_file() or (folder / "scoring_contract.json").is_file()


def is_within(path: str | Path, place: str | Path) -> bool:
    """Return whether `path` is `place` or lies below it, links followed."""
    inner, outer = user_path(path).resolve(), user_path(place).resolve()
    return inner == outer or outer in inner.parents


# --- A run's output directory ----------------------------------------------------------------------------------------

_SHARD = r"(-\d{5}-of-\d{5})?\.safetensors"
_MODEL_FILE = (
    r"config\.json|scoring_contract\.json|adapter_config\.json|"
    rf"(adapter_)?model({_SHARD}|\.safetensors\.index\.json)"
)
_REMOVED = re.compile(rf"run|merged|{_CHECKPOINT}|{_MODEL_FILE}")
_WRITTEN_TOO = re.compile(r"README\.md|tokenizer.*\.json|chat_template\.jinja|special_tokens_map\.json")
_TOKENIZER_FILE = r"tokenizer\.model|vocab\.json|vocab\.txt|merges\.txt|added_tokens\.json|generation_config\.json"
_MODEL_OF_OURS = re.compile(rf"{_MODEL_FILE}|{_WRITTEN_TOO.pattern}|{_TOKENIZER_FILE}")
_RECORD = (
    r"run_config\.yaml|(plan|environment|data_report|timing|plan_check|evaluation)\.json|report\.html|"
    r"(rejected_rows|metrics|warnings|steps|attempts|lives|evaluation_scores|nonfinite)\.jsonl|"
    r"stream(-[A-Za-z0-9_-]+)?\.jsonl"
)
_HANG_REPORT = r"hang-(attempt|life)\d+/(rank-\d+\.(json|txt)|\.rank-\d+\.json\.[0-9a-f]{8}\.writing)"
RUN_RECORDS = re.compile(rf"{_RECORD}|\.({_RECORD})\.[0-9a-f]{{8}}\.writing|{_HANG_REPORT}|(.*/)?\.nfs[0-9a-f]+")
"""What a run writes into `run/`, its page and what kills and network disks leave of them too. By path in there."""


def removed_with_a_run(name: str) -> bool:
    """Return whether what has this name in a run's output directory goes when the run is overwritten."""
    return _REMOVED.fullmatch(name) is not None


def run_output_problem(output_dir: Path, removes: bool, merges: bool, read: Iterable[str | Path]) -> str | None:
    """Return why a run can't write into a directory that holds files; `None` when they are an earlier run's.

    Args:
        output_dir: where the run writes.
        removes: it begins by removing an earlier run.
        merges: it writes `merged/` too.
        read: files and folders that the run reads.
    """
    name = f"output_dir={output_dir}"
    inside = [path for path in sorted(output_dir.glob("*")) if removed_with_a_run(path.name)]
    written = inside or [path for path in sorted(output_dir.glob("*")) if _WRITTEN_TOO.fullmatch(path.name)]
    if written and not _holds_a_run(output_dir):
        return (
            f"{name}: holds {written[0].name}, which no run of rm_scale wrote (no run/run_config.yaml), and which "
            "would be written over. Fix: another output_dir."
        )
    for path in inside if removes else ():
        for place in (place for place in read if is_within(place, path)):
            return f"{name}: {place} lies in {path}, which is removed with the earlier run. Fix: another output_dir."
    merged = output_dir / "merged"
    added = foreign_files(merged)
    is_foreign = added is None and merged.exists() and not (merged / "scoring_contract.json").is_file()
    if (removes or merges) and (added or is_foreign):
        seen = added[0] if added else "no merged model of ours"
        return f"{name}: {merged} holds {seen}, which would be lost. Fix: move it away, or another output_dir."
    for path in inside if removes else ():
        for foreign in foreign_in(path):
            return (
                f"{name}: {path / foreign} was not written by the earlier run, and {path} is removed with that. "
                "Fix: move it away, or another output_dir."
            )
    return None


def _holds_a_run(output_dir: Path) -> bool:
    is_recorded = (output_dir / "run" / "run_config.yaml").is_file()
    return is_recorded or any(_files_of_checkpoint(path) is not None for path in output_dir.glob("checkpoint-*"))


def foreign_in(path: Path) -> list[str]:
    """Return the files in a part of a run's output directory that no run has written, by their paths in it.

    Args:
        path: what `removed_with_a_run` names: `run`, a checkpoint, `merged`, or a file of the model, which is ours.
    """
    if path.is_symlink() or not path.is_dir():
        return []
    names = [name for name in _files_below(path) if (path / name).is_symlink() or not (path / name).is_dir()]
    if path.name == "run":
        return [name for name in names if not RUN_RECORDS.fullmatch(name)]
    if path.name == "merged":
        foreign = foreign_files(path)
        return [name for name in names if not _MODEL_OF_OURS.fullmatch(name)] if foreign is None else foreign
    files = _files_of_checkpoint(path)
    return names if files is None else [name for name in names if name not in files]


def _files_of_checkpoint(folder: Path) -> set[str] | None:
    """Return the files of a checkpoint as its manifest lists them, and the manifest; `None` where it is not ours."""
    values, named = read_json_object(folder / _MANIFEST), re.search(r"checkpoint-(\d+)", folder.name)
    files = values.get("files")
    if (
        named is None
        or values.get("step") != int(named[1])
        or not isinstance(files, dict)
        or "world_size" not in values
    ):
        return None
    return {*files, _MANIFEST}


_MANIFEST = "manifest.json"


def remove_part(path: Path) -> list[str]:
    """Remove a part of an earlier run, as far as a run wrote it; return the files in it that are left.

    What tells that it is ours goes last, so that whoever is killed in between can begin anew.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return []
    left = foreign_in(path)
    last = ("run_config.yaml", _MANIFEST, LIST_FILE, "scoring_contract.json")
    for name in sorted(_files_below(path), key=lambda name: (name in last, name)):
        if name not in left and ((path / name).is_symlink() or not (path / name).is_dir()):
            (path / name).unlink(missing_ok=True)
    for place, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):  # something is left in it
            os.rmdir(place)
    return left


# --- Folders ---------------------------------------------------------------------------------------------------------

LIST_FILE = "rm_scale_export.json"
"""In a folder that we may replace later: which files are ours."""


def list_files(folder: Path) -> Path:
    """Write down which files of a folder are ours, when all are there; return the list's path."""
    record = {"rm_scale": __version__, "files": [*_files_below(folder), LIST_FILE]}
    return write_whole(folder / LIST_FILE, json.dumps(record, indent=1) + "\n")


def foreign_files(folder: Path) -> list[str] | None:
    """Return what a folder holds beside what we listed there; `None` when it has no list of ours."""
    listed = read_json_object(folder / LIST_FILE).get("files")
    if not isinstance(listed, list):
        return None
    return [name for name in _files_below(folder) if name not in listed]


def _files_below(folder: Path) -> list[str]:
    """Return the files below a folder; of links only their own names, and folders that hold nothing."""
    found = []
    for place, folders, files in os.walk(folder):
        names = [*files, *(name for name in folders if Path(place, name).is_symlink())]
        if not folders and not files and Path(place) != folder:
            found.append(place)
        found += [str(Path(place, name)) for name in names]
    return sorted(Path(path).relative_to(folder).as_posix() for path in found)


def folder_problem(name: str, target: Path, kept: Iterable[tuple[str, str | Path]]) -> str | None:
    """Return why a folder must not be replaced: it is or holds something that must stay; `None` when it may.

    Args:
        name: how the message begins, such as "output=outputs/exported".
        target: the folder to replace.
        kept: what is read, and what it is called in the message. The current directory counts by itself.
    """
    if target.is_symlink():
        return f"{name}: is a link. Fix: give the folder itself, or another name."
    for what, place in [*kept, ("the current directory", Path.cwd())]:
        if Path(place).expanduser().exists() and is_within(place, target):
            is_it = Path(place).expanduser().resolve() == target.resolve()
            return f"{name}: {'is' if is_it else 'holds'} {what} ({place}); it is not replaced. Fix: another folder."
    return None
