"""How a checkpoint reaches the disk: under a temporary name, checked, sealed with a manifest, then renamed.

A kill at any moment leaves the earlier checkpoints as they were, and at most a folder that no resume looks at.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from rm_scale.distributed import agreed_errors, gather_from_ranks
from rm_scale.errors import CheckpointError, DiskError, UserError, system_fault
from rm_scale.files import sync
from rm_scale.logs import get_logger
from rm_scale.output_paths import foreign_in
from rm_scale.texts import one_line
from rm_scale.training.checkpoint.manifest import (
    FileRecord,
    Manifest,
    checkpoint_step,
    checkpoints_in,
    files_in,
    hash_files,
    write_manifest,
)

logger = get_logger(__name__)

ASIDE = ".tmp-checkpoint-"
LATER = "later-"
UNVERIFIED = "unverified-"
FOREIGN = "foreign-"
_ASIDE_NAME = re.compile(rf"{re.escape(ASIDE)}(\d+-(attempt|life)\d+|old)-[0-9a-f]{{8}}")
_TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "iostream error")

SPARE_SHARE = 0.05
"""Share of its size that must be free beyond a checkpoint: file systems round up, and other programs write too."""


def aside_name(step: int, attempt: int) -> str:
    """Return a folder name that no other attempt has: an earlier one may still be writing when the next has begun."""
    return f"{ASIDE}{step}-attempt{attempt}-{uuid.uuid4().hex[:8]}"


def remove_leftovers(output_dir: Path) -> None:
    """Remove what killed saves of earlier attempts left."""
    for path in sorted(path for path in output_dir.glob(f"{ASIDE}*") if _ASIDE_NAME.fullmatch(path.name)):
        logger.info(f"removing {path.name}: a checkpoint that was never finished")
        shutil.rmtree(path, ignore_errors=True)


def set_aside_later(output_dir: Path, step: int) -> None:
    """Keep, under another name, checkpoints beyond the one that was asked for by name: this run will write its own."""
    for folder in checkpoints_in(output_dir):
        if (checkpoint_step(folder) or 0) > step:
            other = output_dir / f"{LATER}{folder.name}-{uuid.uuid4().hex[:8]}"
            logger.warning(f"{folder.name} is later than the checkpoint resumed from; it is now {other.name}")
            folder.rename(other)


def require_space(folder: Path, num_bytes: int) -> None:
    """Check that a checkpoint will fit on the disk, before any of it is written.

    Raises:
        DiskError: it won't fit.
    """
    free = shutil.disk_usage(folder).free
    needed = int(num_bytes * (1 + SPARE_SHARE))
    if free < needed:
        raise DiskError(
            f"{folder}: a checkpoint takes about {num_bytes / 1e9:.3g} GB and {free / 1e9:.3g} GB are free. Fix: free "
            "disk space, or lower --save_total_limit."
        )


def seal(folder: Path, manifest: Manifest, written: Iterable[str], rank: int) -> Manifest:
    """Hash the files in the folder, force them to the disk, and add the manifest. A collective.

    Args:
        folder: the checkpoint, still under its temporary name.
        manifest: all but the files.
        written: files that this rank wrote and hashes; rank 0 hashes all others.
        rank: this rank.

    Returns:
        The manifest with its files, on the first rank.

    Raises:
        DiskError: on every rank, when a file can't be read back or a rank's files are not on the first rank's disk.
    """
    mine: dict[str, FileRecord] = {}
    with agreed_errors():
        mine = _hashed(folder, list(written))
    records = {name: record for part in gather_from_ranks(mine) for name, record in part.items()}
    with agreed_errors():
        if rank == 0:
            with writing(folder):
                _require_shared(folder, records)
                rest = [name for name in files_in(folder) if name not in records]
                manifest = replace(manifest, files={**records, **_hashed(folder, rest)})
                write_manifest(folder, manifest)
    return manifest


def _hashed(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    with writing(folder):
        for name in names:
            sync(folder / name)  # a rename may otherwise outlive the content
        return hash_files(folder, names)


def _require_shared(folder: Path, records: dict[str, FileRecord]) -> None:
    """Check that rank 0 sees the files of all ranks: the output directory must be shared between nodes."""
    for name, record in records.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.size:
            raise CheckpointError(
                f"{path}: a rank wrote it, but rank 0 does not see it: output_dir is not on a file system that all "
                "nodes share. Fix: choose an output_dir that is the same folder on every node."
            )


def publish(aside: Path, final: Path) -> None:
    """Give a sealed checkpoint its name, by one rename. A folder of that name, from an abandoned attempt, is removed.

    It is removed after the rename and put back if that fails. One that holds what no run has written is kept aside.

    Raises:
        DiskError: the rename failed.
    """
    old: Path | None = None
    with writing(final):
        foreign = foreign_in(final)
        if foreign:
            other = final.with_name(f"{FOREIGN}{final.name}-{uuid.uuid4().hex[:8]}")
            logger.warning(f"{final.name} holds {foreign[0]}, which no run has written; it is now {other.name}")
            final.rename(other)
        elif final.exists():
            old = final.with_name(f"{ASIDE}old-{uuid.uuid4().hex[:8]}")
            final.rename(old)
        try:
            aside.rename(final)
        except OSError:
            if old is not None:
                with contextlib.suppress(OSError):
                    old.rename(final)
            raise
        sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def keep_one_unverified(newest: Path) -> None:
    """Remove earlier unverified checkpoints if this is one: a run that is started again may leave one each time.

    What the disk refuses is tried again after the next one.
    """
    if newest.name.startswith(UNVERIFIED):
        with _removing(newest.parent):
            for folder in newest.parent.glob(f"{UNVERIFIED}checkpoint-*"):
                if folder != newest and not foreign_in(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, best_step: int | None) -> None:
    """Keep the newest `limit` checkpoints and the best one. Called after a new one has been published, never before.

    What holds files that no run has written stays, and is not counted. What can't be removed is told of, and tried
    again after the next save: the new checkpoint is whole, and the run is sound.
    """
    if limit is None:
        return
    with _removing(output_dir):
        ours = [folder for folder in checkpoints_in(output_dir) if not foreign_in(folder)]
        for folder in ours[limit:]:
            if checkpoint_step(folder) == best_step:
                continue
            # Renamed first, so that a kill in the middle leaves no half checkpoint under its name.
            old = folder.with_name(f"{ASIDE}old-{uuid.uuid4().hex[:8]}")
            folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _removing(output_dir: Path) -> Iterator[None]:
    """Tell of an error of the disk that ends the block, and go on."""
    try:
        yield
    except OSError as error:
        logger.warning(
            f"{output_dir}: older checkpoints could not be removed ({one_line(error, 160)}); it is tried again after "
            "the next save"
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full or failing disk into an error that a run may survive.

    Raises:
        DiskError: writing below `folder` failed.
    """
    try:
        yield
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        raise DiskError(
            f"{folder}: could not be written ({one_line(error, 200)}). Fix: free disk space, or choose "
            "another output_dir."
        ) from error


def is_of_the_disk(error: Exception) -> bool:
    """Return whether a library has met a full or failing disk.

    torch's writer reports that as a RuntimeError of its own, and tokenizers as an exception of no class at all.
    """
    if isinstance(error, UserError):
        return False
    if isinstance(error, OSError | SafetensorError) or system_fault(error) is not None:
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _TORCH_WRITER)
