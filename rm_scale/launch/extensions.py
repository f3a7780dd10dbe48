"""The C++ operators that DeepSpeed compiles on first use: a folder for each environment, and removal of dead locks."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from importlib import metadata
from pathlib import Path

from rm_scale.logs import get_logger

logger = get_logger(__name__)

# The slowest operator takes a few minutes to compile on two busy cores.
STALE_LOCK_SECONDS = 30 * 60


def prepare_extensions(local_rank: int) -> Path:
    """Choose the folder for compiled operators, remove locks of dead builds from it, and return it.

    By default torch keeps them in one folder for all environments, which then rebuild each other's operators again and
    again. And a build that was killed leaves a lock, for which every later job waits without a message.

    Args:
        local_rank: only rank 0 of a node clears locks.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_default_folder()))
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    if local_rank == 0:
        clear_stale_locks(folder)
    return folder


def _default_folder() -> Path:
    versions = [sys.prefix, sys.version, *(metadata.version(name) for name in ("torch", "deepspeed"))]
    key = hashlib.sha256("\0".join(versions).encode()).hexdigest()[:12]
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
