"""Folders of compiled code: DeepSpeed's C++ operators, one for each environment, and the caches of a job's node.

Triton, torch's compiler and CUDA keep what they have compiled below the home directory, which all nodes of a cluster
share: a rank that starts waits for locks and writes of all others. `rm_scale_caches` in slurm/common/software.sh names
folders on the node's own disk instead, and they are made here, on each node.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
from importlib import metadata
from pathlib import Path

from rm_scale.logs import get_logger

logger = get_logger(__name__)

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_KERNEL_CACHE_PATH", "CUDA_CACHE_PATH")
"""The variables by which `rm_scale_caches` in slurm/common/software.sh names folders of a node."""

# The slowest operator takes a few minutes to compile on two busy cores.
STALE_LOCK_SECONDS = 30 * 60


def prepare_extensions(local_rank: int) -> Path:
    """Choose the folder for compiled operators, remove locks of dead builds from it, and return it.

    By default torch keeps them in one folder for all environments, which then rebuild each other's operators again and
    again. And a build that was killed leaves a lock, for which every later job waits without a message.

    Args:
        local_rank: only rank 0 of a node clears locks.
    """
    prepare_caches()
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_default_folder()))
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    if local_rank == 0:
        clear_stale_locks(folder)
    return folder


def prepare_caches() -> None:
    """Make the node's folders for compiled code that RM_SCALE_CACHES names, for this user alone.

    What lies there is run, and /tmp is everybody's: a folder of somebody else is not used, nor one that can't be made.
    Then the libraries keep their own choice.
    """
    root = os.environ.get("RM_SCALE_CACHES")
    if not root:
        return
    ours = {name: Path(os.environ[name]) for name in CACHES if os.environ.get(name, "").startswith(f"{root}/")}
    try:
        # The parent belongs to this user as well: else somebody could put another folder in the place of this one.
        for folder in (Path(root).parent, Path(root), *ours.values()):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                raise PermissionError(errno.EPERM, "belongs to somebody else, or is a link", str(folder))
    except OSError as error:
        logger.warning(f"{error.filename}: {error.strerror}. Compiled code is kept where each library wants it.")
        for name in ("RM_SCALE_CACHES", *ours):
            del os.environ[name]


def _default_folder() -> Path:
    versions = [sys.prefix, sys.version, *(metadata.version(name) for name in ("torch", "deepspeed"))]
    key = hashlib.sha256("\0".join(versions).encode()).hexdigest()[:12]
    caches = os.environ.get("RM_SCALE_CACHES")
    if caches:
        return Path(caches) / "torch_extensions" / key
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rm_scale" / "torch_extensions" / key


def clear_stale_locks(folder: Path, older_than_seconds: float = STALE_LOCK_SECONDS) -> list[Path]:
    """Remove locks of builds that can't still be running; return those removed."""
    removed = []
    for lock in folder.glob("**/lock"):
        try:
            age = time.time() - lock.stat().st_mtime
            if age > older_than_seconds:
                lock.unlink()
                removed.append(lock)
                logger.warning(f"removed {lock}: a build that ended {age / 60:.0f} minutes ago left it")
        except FileNotFoundError:
            continue  # its owner has just finished
    return removed
