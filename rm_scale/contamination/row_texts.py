"""What a row says, as it is compared: without roles, system messages and white space around it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rm_scale.data.conversations import message_text
from rm_scale.data.formats import HH_ASSISTANT, HH_HUMAN
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


def said(text: Text) -> str:
    """Return a text, or what the turns of a conversation say, one below the other.

    Roles and system messages are left out, since the same question is asked with and without them; tool calls are JSON.
    """
    if isinstance(text, str):
        return text.replace(HH_HUMAN, "\n\n").replace(HH_ASSISTANT, "\n\n").strip()
    turns = [message for message in text if message["role"] not in ("system", "developer")]
    parts = []
    for message in turns:
        parts.append(message_text(message))
        if message.get("tool_calls"):
            parts.append(json.dumps(message["tool_calls"], sort_keys=True))
    return "\n\n".join(part for part in parts if part).strip()
