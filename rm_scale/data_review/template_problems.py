"""Find what is wrong between the data and the chat template: special tokens in texts, missing ends, empty turns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from rm_scale.data.conversations import message_text
from rm_scale.data.data_report import SourceReport
from rm_scale.data.encoding import EncodedGroup, TextEncoder
from rm_scale.data.preference_group import PreferenceGroup, Text
from rm_scale.data.rejected_rows import REJECTION_REASONS
from rm_scale.data_review.finding import NUM_EXAMPLES, Example, Finding, Suggestion
from rm_scale.data_review.read_groups import plain_text
from rm_scale.data_review.sample import SampledGroup

TEMPLATE_REASONS = (
    *("double_bos", "ends_with_pad", "unfinished_text", "template_error", "lost_text"),
    *("empty", "bad_conversation", "identical_responses", "identical_tokens", "prompt_mismatch"),
)
"""Of `REJECTION_REASONS`: those that speak of texts and templates, and are shown as findings."""
_LAST_TOKENS = 3
"""Behind EOS a template may write a line break, as ChatML's does."""
_EMPTY_HH_TURN = re.compile(r"\n\n(?:Human|Assistant):\s*(?=\n\n(?:Human|Assistant):)")


class TemplateChecker:
    """Looks at one group at a time, as texts and as tokens.

    Args:
        encoder: how the run turns text into tokens.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        tokenizer = encoder.tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        marks = sorted({*added, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None

    def problems(self, group: PreferenceGroup, encoded: EncodedGroup) -> dict[str, str]:
        """Return what is wrong with a group: what was seen, by the name of its finding."""
        found = {}
        mark = self._mark_in(group)
        if mark:
            found["special_tokens"] = mark
            if self._ends_otherwise(group, encoded):
                found["rendered_otherwise"] = mark
        if not all(self._ends_with_eos(ids) for ids in encoded.input_ids):
            found["no_eos"] = str(self._encoder.tokenizer.decode(encoded.input_ids[0][-_LAST_TOKENS:]))
        if any(map(_has_empty_turn, (group.prompt, *group.responses))):
            found["empty_turn"] = "a turn without text"
        return found

    def _mark_in(self, group: PreferenceGroup) -> str:
        for text in (group.prompt, *group.responses):
            seen = self._marks.search(plain_text(text)) if self._marks else None
            if seen:
                return seen[0]
        return ""

    def _ends_otherwise(self, group: PreferenceGroup, encoded: EncodedGroup) -> bool:
        """Tell whether plain text that someone rendered by the chat template ends otherwise than the template does."""
        if not isinstance(group.prompt, str) or not isinstance(group.responses[0], str):
            return False
        if not self._encoder.are_conversations(encoded.input_ids) and self._encoder.chat_template is None:
            return False
        pairs = zip(group.responses, encoded.input_ids, strict=True)
        return any(self._encoder.encode_rendered(group.prompt + str(response)) != ids for response, ids in pairs)

    def _ends_with_eos(self, ids: Sequence[int]) -> bool:
        return self._encoder.tokenizer.eos_token_id in ids[-_LAST_TOKENS:]


def _has_empty_turn(text: Text) -> bool:
    if isinstance(text, str):
        return _EMPTY_HH_TURN.search(text) is not None
    return any(not message_text(message).strip() and not message.get("tool_calls") for message in text)


# --- Findings --------------------------------------------------------------------------------------------------------


def review_templates(
    groups: Sequence[SampledGroup], reports: Sequence[SourceReport], example: Callable[[str, int], Example | None]
) -> list[Finding]:
    """Return what is wrong with texts as a template or a tokenizer sees them.

    Args:
        groups: the sample.
        reports: what became of the rows of each source that was read.
        example: shows a row of a source; `None` for a source that is not open.
    """
    kinds = (_special_tokens, _rendered_otherwise, _no_eos, _empty_turns)
    refused = [finding for reason in TEMPLATE_REASONS for finding in _refused(reason, reports, example)]
    return [*(kind(groups) for kind in kinds), *refused]


def _seen(name: str, groups: Sequence[SampledGroup]) -> list[SampledGroup]:
    return [group for group in groups if name in group.seen]


def _finding(
    name: str, title: str, meaning: str, groups: Sequence[SampledGroup], suggestion: Callable[[str], Suggestion]
) -> Finding:
    found = _seen(name, groups)
    common = Counter(group.seen[name] for group in found).most_common(1)
    return Finding(
        name,
        title,
        "problem" if len(found) > 0.01 * len(groups) else "note" if found else "nothing",
        len(found),
        len(groups),
        "groups",
        True,
        meaning,
        tuple(group.example(**{"seen": group.seen[name]}, **group.best_and_worst()) for group in found[:NUM_EXAMPLES]),
        suggestion(common[0][0]) if found else None,
    )


_special_tokens = partial(
    _finding,
    "special_tokens",
    "Special tokens inside texts",
    "A text holds the name of one of the tokenizer's special tokens, and is read as that token: rendered by someone "
    "else, or written by a user.",
    suggestion=lambda seen: Suggestion(
        f"Most often {seen!r}. Give conversations as lists of messages, and let the chat template write these tokens; "
        "take out what users wrote."
    ),
)
_rendered_otherwise = partial(
    _finding,
    "rendered_otherwise",
    "Rendered texts that end otherwise than the chat template's",
    "A plain text holds the marks of the model's chat template, but isn't what the template would write: a score is "
    "read at the last token, which will be another one when messages are scored later.",
    suggestion=lambda seen: Suggestion("Give conversations as lists of messages (prompt, chosen, rejected)."),
)
_no_eos = partial(
    _finding,
    "no_eos",
    "Sequences that end without EOS",
    f"None of the last {_LAST_TOKENS} tokens is the EOS token. Generated answers end with one when they are scored in "
    "RL, so the last token should be the same in training.",
    suggestion=lambda seen: Suggestion(
        f"Most often they end with {seen!r}. Name the token that ends an answer, or take a chat template that writes "
        "EOS.",
        "--eos_token TOKEN",
    ),
)
_empty_turns = partial(
    _finding,
    "empty_turn",
    "Conversations with an empty turn",
    "A turn of the prompt has no text: often a turn that was lost when the data was made.",
    suggestion=lambda seen: Suggestion("Look at how these rows came about, and leave them out."),
)


def _refused(
    reason: str, reports: Sequence[SourceReport], example: Callable[[str, int], Example | None]
) -> list[Finding]:
    """Return one finding for a reason for which rows were refused; none where it did not occur."""
    entries = [(report, report.rejected[reason]) for report in reports if reason in report.rejected]
    count, out_of = sum(entry.count for _, entry in entries), sum(report.rows_read for report in reports)
    if not count:
        return []
    rows = [(report.name, row) for report, entry in entries for row in entry.first_rows][:NUM_EXAMPLES]
    shown = [example(name, row) for name, row in rows]
    details = "; ".join(entry.example() for _, entry in entries if entry.example())
    return [
        Finding(
            f"refused_{reason}",
            f"Rows refused: {reason}",
            "problem" if count > 0.01 * out_of else "note",
            count,
            out_of,
            "rows",
            False,
            f"They are not trained on, since {REJECTION_REASONS[reason]}.{f' First: {details}' if details else ''}",
            tuple(one for one in shown if one is not None),
            Suggestion(
                "Correct these rows, or accept the loss.",
                f"--max_rejected_share {min(1.0, -(-1000 * count // out_of) / 1000):g}",
            )
            if count > 0.05 * out_of
            else None,
        )
    ]
