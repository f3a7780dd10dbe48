"""`run/warnings.jsonl`: what a run warned about, for its model card and its page, which outlive the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rm_scale.files import read_json_lines
from rm_scale.logs import current_step
from rm_scale.training.pair_counts import EvaluationResult
from rm_scale.training.records import RecordFile, write_waiting

WARNINGS_FILE = "warnings.jsonl"
_NAME = re.compile(r"\[(\w+)\] (.*)", re.DOTALL)
_ROOT = "rm_scale"


class WarningsFile(logging.Handler):
    """Write each warning of this package as a line, once the run's folder is there.

    A line has `time` in Unix seconds, `step` (null before and after training), `name` of a warning that has one, such
    as `accuracy_stuck`, and `text`. Lines of a lower level are kept when they were logged with `extra=logs.KEPT`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._file: RecordFile | None = None
        self._early: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        if record.levelno < logging.WARNING and not getattr(record, "kept", False):
            return
        text = record.getMessage()
        named = _NAME.fullmatch(text)
        name, text = named.groups() if named else (None, text)
        line = {"time": round(record.created, 3), "step": current_step(), "name": name, "text": text}
        if self._file is None:
            self._early.append(line)
        else:
            self._file.append(line)

    def begin(self, folder: Path) -> None:
        """Write what was said so far, and from now on at once.

        Args:
            folder: the run's `run/`.
        """
        early, self._early = self._early, []
        self._file = RecordFile(folder / WARNINGS_FILE)
        for line in early:
            self._file.append(line)

    @property
    def records(self) -> tuple[RecordFile, ...]:
        """The file, once the run's folder is there."""
        return () if self._file is None else (self._file,)


@contextmanager
def warnings_kept(is_main: bool) -> Iterator[None]:
    """Keep this process's warnings until the block ends; see `begin_warnings`."""
    handler = WarningsFile()
    root = logging.getLogger(_ROOT)
    if is_main:
        root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        write_waiting([handler])


def begin_warnings(folder: Path) -> None:
    """Let the warnings that are kept be written to `folder`."""
    for handler in logging.getLogger(_ROOT).handlers:
        if isinstance(handler, WarningsFile):
            handler.begin(folder)


def read_warnings(folder: Path) -> list[tuple[str | None, str]]:
    """Return name and text of each warning in `folder`'s file, once each, in their order.

    Attempts of one run warn of the same things; of those that differ in numbers only, the last one counts.
    """
    found: dict[str, tuple[str | None, str]] = {}
    for line in read_json_lines(folder / WARNINGS_FILE):
        name, text = line.get("name"), str(line.get("text", ""))
        key = re.sub(r"[\d.,]+", "0", f"{name} {text}")
        found[key] = (name if isinstance(name, str) else None, text)
    return list(found.values())


def evaluation_warnings(result: EvaluationResult) -> Iterator[str]:
    """Say what looks wrong with a held-out evaluation, each beginning with its name in brackets."""
    values = result.as_dict()
    accuracy, (low, high) = values["accuracy"], values["accuracy_ci95"]
    if accuracy is not None and low <= 0.5:
        what = "worse than chance" if high < 0.5 else "not better than chance"
        yield (
            f"[{what.replace(' ', '_')}] held-out accuracy is {accuracy:.4f} (95 %: {low:.4f} to {high:.4f}), "
            f"{what}. Check the labels, the learning rate (a small model with random weights needs 1e-3 and more), the "
            "number of steps, and whether there are enough held-out pairs."
        )
    ties, pairs = values["num_ties"], values["num_pairs"]
    if ties > 0.01 * pairs:
        yield (
            f"[equal_rewards] {ties} of {pairs} held-out pairs have two equal rewards. Check that responses differ "
            "before max_length, and that the padding token is not EOS."
        )
