"""Rows that can't be used: the named reasons for rejecting one, and the exception that says so."""

from __future__ import annotations

REJECTION_REASONS = {
    "bad_json": "the line is not valid JSON",
    "bad_csv": "the line does not have as many cells as the header",
    "missing_key": "a column that the format needs is absent or null in this row",
    "wrong_type": "a value is not of the type the format needs (text, list of messages, list of numbers, ...)",
    "too_large": "the row has more than 16 MB, or more than 10,000 columns",
    "too_many_responses": "the row has more than 1,000 responses",
    "bad_unicode": "a text holds lone surrogates or NUL characters",
    "bad_conversation": "messages without role or content, or roles that don't alternate",
    "prompt_mismatch": "chosen and rejected don't start with the same prompt",
    "unread_context": "a column that is not read holds what the responses answer (instruction, system, history, ...)",
    "empty": "a prompt that must not be empty, or a response, has no text",
    "identical_responses": "all responses of the row are the same text",
    "no_preference": "fewer than two responses, or every response has the same rank and there is no soft label",
    "bad_label": "rank, margin or soft label is missing, not finite, out of range, or of the wrong count",
    "over_long": "a sequence is longer than max_length (and could not be truncated)",
    "identical_tokens": "all responses are the same tokens after encoding",
    "template_error": "the chat template could not render the conversation",
    "lost_text": "the chat template left out a message, a tool call or a tool",
    "unfinished_text": "a rendered conversation doesn't end with an answer as the chat template ends it",
    "refused_by_server": "the server that scores (--endpoint) refuses this text",
    "double_bos": "a sequence begins with two BOS tokens: the text holds one and another is added to it",
    "ends_with_pad": "a sequence ends with the padding token, so that its last real token can't be found",
}

FILTERED = "filtered"
"""Why a row was left out that the user's own filter leaves out: counted, and no rejection."""


class RejectedRow(Exception):
    """One input row that can't be used.

    Args:
        reason: a key of `REJECTION_REASONS`, or `FILTERED`.
        detail: what exactly was seen in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REJECTION_REASONS or reason == FILTERED, reason
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)
