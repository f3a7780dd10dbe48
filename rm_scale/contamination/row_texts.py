"""What a row says, as it is compared: without roles, system messages and white space around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rm_scale.data.plain_keys import said
from rm_scale.data.preference_group import Text


@dataclass(frozen=True)
class RowTexts:
    """A row's texts.

    Attributes:
        row: its number in its file, from 0.
        prompt: what was said before the responses; "" when there is nothing.
        responses: what was answered.
    """

    row: int
    prompt: str
    responses: tuple[str, ...]

    @classmethod
    def of(cls, row: int, prompt: Text, responses: Sequence[Text]) -> RowTexts:
        """Return the texts of a prompt and its responses."""
        return cls(row, said(prompt), tuple(said(response) for response in responses))
