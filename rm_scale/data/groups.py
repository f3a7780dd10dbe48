"""`PreferenceGroup`: the one internal form of a preference, and the named reasons for refusing a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Text = str | list[Message]
"""Plain text, or a conversation as a list of {"role", "content", ...} messages."""

REJECTION_REASONS = {
    "bad_json": "the line is not valid JSON",
    "bad_csv": "the line does not have as many cells as the header",
    "missing_key": "a column that the format needs is absent or null in this row",
    "wrong_type": "a value is not of the type the format needs (text, list of messages, list of numbers, ...)",
    "bad_unicode": "a text holds lone surrogates or NUL characters",
    "bad_conversation": "messages without role or content, or roles that don't alternate",
    "prompt_mismatch": "chosen and rejected don't start with the same prompt",
    "empty": "a prompt that must not be empty, or a response, has no text",
    "identical_responses": "all responses of the row are the same text",
    "no_preference": "fewer than two responses, or every response has the same rank and there is no soft label",
    "bad_label": "rank, margin or soft label is missing, not finite, out of range, or of the wrong count",
    "over_long": "a sequence is longer than max_length (and could not be truncated)",
    "identical_tokens": "all responses are the same tokens after encoding",
    "template_error": "the chat template could not render the conversation",
    "double_bos": "a sequence begins with two BOS tokens: the text holds one and another is added to it",
    "ends_with_pad": "a sequence ends with the padding token, so that its last real token can't be found",
}


class RejectedRow(Exception):
    """One input row that can't be used.

    Args:
        reason: a key of `REJECTION_REASONS`.
        detail: what exactly was seen in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REJECTION_REASONS, reason
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


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
