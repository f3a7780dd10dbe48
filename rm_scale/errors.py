"""The errors a user can meet: each says the value seen, the rule it broke and what to do about it.

Anything that derives from `UserError` is printed as one plain message with exit code 2 by the command line (a
traceback only with `--debug`). Everything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can put right. The text says value, rule and fix.

    Attributes:
        met_by: who raises the same error, so that one of them can speak for all: every rank of the world, every rank
            of this machine, or this rank alone.
        exit_code: with which a program ends after it.
    """

    exit_code: int = 2
    met_by: Literal["world", "node", "rank"] = "rank"


class ConfigError(UserError):
    """One or more settings are wrong; all of them are listed at once.

    Args:
        problems: one sentence each, in the form "name=value: rule. Fix: ...".
        heading: what was being checked; it becomes the first line of the message.
    """

    def __init__(self, problems: Iterable[str], heading: str = "the configuration can't be used") -> None:
        self.problems = list(problems)
        self.heading = heading
        count = len(self.problems)
        lines = [f"{heading} ({count} problem{'s' if count != 1 else ''}):"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1)]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str], str]]:
        """Errors travel between ranks; the default would make the whole text the list of problems."""
        return ConfigError, (self.problems, self.heading)


def collect_problems(problems: list[str], read: Callable[[], T]) -> T | None:
    """Run `read` and return its result; on a `UserError` add what it says to `problems` and return `None`."""
    try:
        return read()
    except ConfigError as error:
        problems.extend(error.problems)
    except UserError as error:
        problems.append(str(error))
    return None


class DataError(UserError):
    """A preference file can't be read, or too much of it would be lost."""


class ModelError(UserError):
    """A model, tokenizer or adapter can't be used as a reward model."""


class TrainingError(UserError):
    """A run had to stop: non-finite loss or head, no progress that could be trusted."""


class CheckpointError(UserError):
    """A save or a reload did not give back the same model."""


class ScoresDiffer(CheckpointError):
    """A saved model holds the right head and sound tensors, but scores a text differently after the reload."""


class DiskError(CheckpointError):
    """A save could not be written. The run itself is sound, so it may go on without it."""


class AssetError(UserError):
    """A model or file that `rm-scale assets` fetches could not be fetched or verified."""


# --- What the operating system refuses -------------------------------------------------------------------------------

_NEEDS_ROOM = "Fix: make room there (df -h, df -i), or write to another disk (temporary files: TMPDIR=DIR)."
_FAULTS_OF_ANY_FILE = {
    errno.ENOSPC: f"the disk is full. {_NEEDS_ROOM}",
    errno.EDQUOT: f"the disk quota is used up. {_NEEDS_ROOM}",
    errno.EROFS: "the file system is read-only. Fix: write to another folder.",
    errno.EFBIG: "the file would be larger than the file system or `ulimit -f` allows. Fix: write to another disk.",
    errno.EIO: "the disk reports an input/output error. Fix: check the disk, or use another.",
    errno.EMFILE: "this process has too many files open. Fix: raise the limit, ulimit -n.",
}
# These say something about a file only when the error names one: a port may be refused with EACCES too.
_FAULTS_OF_A_NAMED_FILE = {
    errno.EACCES: "this user may not read or write it. Fix: change its permissions, or use another path.",
    errno.EPERM: "this user may not read or write it. Fix: change its permissions, or use another path.",
    errno.ENAMETOOLONG: "the name is too long for the file system. Fix: give a shorter name.",
    errno.EISDIR: "is a folder, where a file is needed. Fix: name a file.",
    errno.ENOTDIR: "a part of this path is a file, not a folder. Fix: correct the path.",
    errno.ELOOP: "links lead round in a circle. Fix: correct the link.",
    errno.ENOENT: "is not there, and can't be made there. Fix: correct the path.",
    errno.EEXIST: "is there already. Fix: give another name, or move it away.",
    errno.ESTALE: "another machine has replaced it meanwhile. Fix: start again.",
}
# What Python says of a path before it asks the system. It names no file.
_FAULTS_OF_A_PATH = {
    "embedded null byte": "a path holds a NUL, which no name of a file can. Fix: correct the path.",
    "embedded null character": "a path holds a NUL, which no name of a file can. Fix: correct the path.",
    "Could not determine home directory.": (
        "a path begins with ~, and there is no such user, or no home. Fix: write the folder's whole path."
    ),
}


def system_fault(error: BaseException | None) -> str | None:
    """Return the message for what the operating system refused, when the user can put it right.

    Args:
        error: any exception. Those it was raised from are looked at too; and libraries written in Rust, such as
            safetensors and tokenizers, name the system's error number in their text only.

    Returns:
        Value, rule and fix; `None` for any other error.
    """
    while error is not None:
        if isinstance(error, ValueError | RuntimeError) and str(error) in _FAULTS_OF_A_PATH:
            return _FAULTS_OF_A_PATH[str(error)]
        name, number = None, None
        if isinstance(error, OSError):
            name, number = error.filename, error.errno
        elif found := re.search(r"\(os error (\d{1,4})\)", str(error)):
            number = int(found[1])
        rule = _FAULTS_OF_ANY_FILE.get(number or 0)
        rule = rule or (_FAULTS_OF_A_NAMED_FILE.get(number or 0) if name is not None else None)
        if rule is not None:
            return f"{_file_name(name)}: {rule}"
        error = error.__cause__
    return None


def _file_name(name: object) -> str:
    if name is None:
        return "a file can't be read or written"
    text = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 200 else f"{text[:80]}...{text[-80:]} ({len(text)} characters)"
