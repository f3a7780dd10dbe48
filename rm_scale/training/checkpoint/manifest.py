"""The manifest of a checkpoint, written last: it names every file with its size and SHA-256.

A folder without a manifest was never finished. One whose files differ from it is damaged. One whose facts differ from
this run's belongs to another run. All three are refused, each with its own error, before anything is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rm_scale.distributed import agreed_errors, gather_from_ranks
from rm_scale.errors import CheckpointError
from rm_scale.files import sha256_of_file, write_whole
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
# Endings of files that a resume reads. One of these that is not in the manifest was put there by somebody else.
_LOADED = (".safetensors", ".pt", ".pth", ".bin", ".json")


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        step: optimizer steps done.
        world_size, zero_stage: of the run that wrote it; another may resume if `portable`.
        resumable: it holds optimizer state, not the model alone.
        portable: optimizer state is stored by parameter name, for any number of ranks and any ZeRO stage.
        attempt: which attempt of the run wrote it.
        facts: what decides a run's result, by setting (see `rm_scale.training.checkpoint.run_facts`).
        versions: of the libraries.
        files: every file, by its path in the folder.
        format: of this file.
    """

    step: int
    world_size: int
    zero_stage: int
    resumable: bool
    portable: bool
    attempt: int
    facts: dict[str, Any]
    versions: dict[str, str | None]
    files: dict[str, FileRecord] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(record.size for record in self.files.values())


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Read files back and return the size and hash of each, by name."""
    records = {}
    for name in names:
        path = folder / name
        records[name] = FileRecord(path.stat().st_size, sha256_of_file(path))
    return records


def files_in(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it, without the manifest's."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.name != MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest so that it is either whole on the disk or not there."""
    write_whole(folder / MANIFEST, json.dumps(asdict(manifest), indent=1), durable=True)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it can't be read, or it is of another step than the folder's name says.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}. It was never finished, or was not written by rm_scale. Fix: resume from "
            "another checkpoint, or --resume_from_checkpoint last."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "life" in values:  # what version 0.1 called an attempt
            values["attempt"] = values.pop("life")
        files = {str(name): FileRecord(**record) for name, record in values.pop("files").items()}
        manifest = Manifest(**values, files=files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: can't be read ({one_line(error, 120)}). The checkpoint is damaged. Fix: resume "
            "from another checkpoint, or --resume_from_checkpoint last."
        ) from error
    named = checkpoint_step(folder)
    if named is not None and named != manifest.step:
        raise CheckpointError(
            f"{path}: is of step {manifest.step}, but the folder is called {folder.name}. It is a foreign checkpoint "
            "under this name. Fix: resume from another checkpoint."
        )
    return manifest


def checkpoint_step(folder: Path) -> int | None:
    """Return the N of a folder called checkpoint-N, `None` for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match.group(1)) if match else None


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return all checkpoint-N folders, newest first, whatever is in them."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if checkpoint_step(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: checkpoint_step(path) or 0, reverse=True)


def file_problems(folder: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> list[str]:
    """Compare the files of a checkpoint with its manifest; ranks share the hashing.

    Returns:
        One sentence for each missing, cut, altered or unknown file of this rank's share.
    """
    problems = []
    for name in sorted(manifest.files)[rank::world_size]:
        record, path = manifest.files[name], folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != record.size:
            problems.append(f"{name} has {path.stat().st_size:,} bytes instead of {record.size:,}")
        elif hash_files(folder, [name])[name].sha256 != record.sha256:
            problems.append(f"{name} differs from what was written (SHA-256)")
    if rank == 0:
        strangers = [name for name in files_in(folder) if name not in manifest.files and name.endswith(_LOADED)]
        problems += [f"{name} is not of this checkpoint" for name in strangers]
    return problems


def check_files(folder: Path, rank: int, world_size: int) -> Manifest:
    """Check that a checkpoint is whole and can be resumed. A collective: ranks share the hashing, and the verdict.

    Raises:
        CheckpointError: on every rank; it names the files.
    """
    with agreed_errors():
        manifest = read_manifest(folder)
        if not manifest.resumable:
            raise CheckpointError(
                f"{folder}: holds the model only (save_only_model). Fix: resume from another checkpoint, or start a "
                "new run from it with --model_name_or_path."
            )
    try:
        problems = file_problems(folder, manifest, rank, world_size)
    except OSError as error:
        problems = [f"it can't be read ({error})"]
    everything = [problem for part in gather_from_ranks(problems) for problem in part]
    if everything:
        more = f" and {len(everything) - 3} more" if len(everything) > 3 else ""
        damaged = CheckpointError(
            f"{folder}: the checkpoint is damaged: {'; '.join(everything[:3])}{more}. Fix: resume from another "
            "checkpoint, or --resume_from_checkpoint last."
        )
        damaged.met_by = "world"
        raise damaged
    return manifest


def newest_valid(output_dir: Path, rank: int, world_size: int) -> Path | None:
    """Return the newest whole checkpoint, or `None`; warn of each that is passed over. A collective."""
    # Rank 0's list counts: on a shared file system others may still see an older one.
    candidates = gather_from_ranks(checkpoints_in(output_dir))[0]
    for folder in candidates:
        try:
            check_files(folder, rank, world_size)
        except CheckpointError as error:
            logger.warning(f"passing over {folder.name}: {str(error).removeprefix(f'{folder}: ')}")
            continue
        return Path(folder)
    return None


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Iterable[str] = ()) -> list[str]:
    """Return how this run differs from the one that wrote a checkpoint: one line per fact, but those in `allowed`."""
    skip = set(allowed)
    return [
        f"{name}: {saved.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted({*saved, *now})
        if name not in skip and saved.get(name) != now.get(name)
    ]


def require_same_run(folder: Path, now: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Refuse a checkpoint of a run with other settings, data or model.

    Raises:
        CheckpointError: it lists the differences.
    """
    found = differences(read_manifest(folder).facts, now, allowed)
    if found:
        names = " ".join(line.split(":")[0] for line in found)
        listed = "\n".join(f"  - {line}" for line in found)
        raise CheckpointError(
            f"{folder}: belongs to a run that differs from this one:\n{listed}\n"
            "A resumed run would be neither of the two. Fix: set them as they were, choose another output_dir, or go "
            f"on with the change by name: --allow_changed {names}"
        )
