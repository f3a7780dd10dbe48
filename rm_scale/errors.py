"""The errors a user can meet: each says the value seen, the rule it broke and what to do about it.

Anything that derives from `UserError` is printed as one plain message with exit code 2 by the command line (a
traceback only with `--debug`). Everything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can put right. The text says value, rule and fix.

    Attributes:
        met_by: who raises the same error, so that one of them can speak for all: every rank of the world, every rank
            of this machine, or this rank alone.
    """

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
    """Run `read` and give its result; on a user's error add what it says to `problems` and give `None`."""
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


class DiskError(CheckpointError):
    """A save could not be written. The run itself is sound, so it may go on without it."""


class AssetError(UserError):
    """A model or file that `rm-scale assets` fetches could not be fetched or verified."""
