"""`PreferenceGroup`: the one internal form of a preference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Text = str | list[Message]
"""Plain text, or a conversation as a list of {"role", "content", ...} messages."""


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """One prompt, K >= 2 responses, ranks with ties allowed, and where it came from.

    Attributes:
        prompt: text, or messages; "" or [] when there is none.
        responses: K continuations of the prompt, of the prompt's kind.
        ranks: K ranks, 0 is best; equal ranks are ties.
        margin: how much better the first is than the second (K = 2), `None` when not given. >= 0.
        soft_label: probability that response 0 is better than response 1 (K = 2), `None` when labels are hard.
        tools: tool descriptions for the chat template, or `None`.
        source: file or dataset name.
        subset: name for evaluation per subset, "" when there is none.
        id: the row's own id, or its index in the source.
    """

    prompt: Text
    responses: tuple[Text, ...]
    ranks: tuple[int, ...]
    margin: float | None = None
    soft_label: float | None = None
    tools: list[Any] | None = None
    source: str = ""
    subset: str = ""
    id: str = ""

    @property
    def is_conversational(self) -> bool:
        """True when prompt and responses are messages, to be rendered by a chat template."""
        return not isinstance(self.responses[0], str)
