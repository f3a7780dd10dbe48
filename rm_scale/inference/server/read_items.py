"""Read what a request asks to be scored, by the rules of rows and of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rm_scale.data.formats import without_text_prompt
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.inference.scoring.row_files import Scorable, scorable
from rm_scale.inference.server.request_limits import Refused


def read_items(items: Sequence[dict[str, Any]]) -> list[Scorable]:
    """Read items with the fields of a row.

    Raises:
        Refused: an item has nothing to score.
    """
    found = []
    for number, item in enumerate(items):
        try:
            found.append(scorable(item, cells=False))
        except RejectedRow as rejected:
            raise Refused(422, rejected.reason, f"item {number}: {rejected}") from None
    return found


def read_once(prompt: Any, completions: list[Any]) -> list[Any]:
    """Return completions without a prompt that all of them repeat, as in training.

    Raises:
        Refused: only some of them repeat it.
    """
    if not isinstance(prompt, str) or not all(isinstance(one, str) for one in completions):
        return completions
    try:
        return list(without_text_prompt(prompt, completions))
    except RejectedRow as rejected:
        raise Refused(422, rejected.reason, f"completions: {rejected}") from None
