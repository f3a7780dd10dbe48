"""Find columns that are not read although they seem to hold what the responses answer, or change what is trained on.

A file whose question stands in `instruction`, beside `chosen` and `rejected`, would train on answers without their
question. What is repeated in the texts that are read (as in UltraFeedback's `messages`) is no loss.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row

# fmt: off
_CONTEXT_WORDS = frozenset([
    "instruction", "instructions", "question", "questions", "input", "inputs", "query", "queries", "context", "system",
    "history", "prompt", "prompts", "conversation", "conversations", "messages", "dialog", "dialogue", "turns",
    "passage", "document", "problem", "tools",
])
_MEDIA_WORDS = frozenset(["image", "images", "audio", "video", "videos"])
# A name with one of these tells about the context, and does not hold it: prompt_id, num_turns, question_source.
_LABEL_WORDS = frozenset([
    "id", "ids", "idx", "index", "hash", "source", "name", "type", "kind", "category", "topic", "lang", "language",
    "len", "length", "count", "num", "number", "n", "url", "score", "scores", "rating", "ratings", "model", "token",
    "tokens", "time", "date", "label", "labels", "path", "split", "version", "template",
])
# fmt: on
# Columns to which TRL's RewardTrainer gives a meaning that is not theirs here.
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
_TOKEN_IDS = ("chosen_ids", "rejected_ids", "chosen_input_ids", "rejected_input_ids")
# Entries of a message that are no text of it.
_NO_TEXT = frozenset(["role", "from", "type", "id", "name"])


class UnreadContext(RejectedRow):
    """A row with context that its format does not read.

    Args:
        columns: where it stands.
        detail: what was seen there.
    """

    def __init__(self, columns: Sequence[str], detail: str) -> None:
        self.columns = tuple(columns)
        super().__init__("unread_context", detail)

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild it in another process, with its columns."""
        return type(self), (self.columns, self.detail)


@functools.lru_cache(maxsize=1 << 15)  # more than a file may have columns, or each would be worked out for every row
def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))


def holds_context(name: str) -> bool:
    """Tell whether a column of this name seems to hold what the responses answer."""
    words = _words(name)
    return bool(words & (_CONTEXT_WORDS | _MEDIA_WORDS)) and not words & _LABEL_WORDS


def refuse_unread_context(row: Row, group: PreferenceGroup, read: Collection[str]) -> None:
    """Refuse a row of which a column holds context that is not part of the group's texts.

    Args:
        row: names and values.
        group: what was read of them.
        read: columns that the format reads.

    Raises:
        UnreadContext: names the columns.
    """
    found = [
        name
        for name, value in row.items()
        if name not in read and (_has_other_meaning(name, value) or _is_unread(name, value, group))
    ]
    if found:
        raise UnreadContext(found, f"{found[0]} holds {_shown(row[found[0]])}, which is not read")


def refuse_template_arguments(row: Row) -> None:
    """Refuse a row to score that asks for arguments of the chat template: templates are called without.

    Raises:
        UnreadContext: it has such a column, and not an empty one.
    """
    value = row.get(TEMPLATE_ARGUMENTS)
    if _has_other_meaning(TEMPLATE_ARGUMENTS, value):
        raise UnreadContext([TEMPLATE_ARGUMENTS], f"{TEMPLATE_ARGUMENTS} holds {_shown(value)}, which is not read")


def advice(columns: Sequence[str]) -> str:
    """Return how rows with such columns can be read."""
    ignoring = f"--ignore_columns {' '.join(columns)} to train without"
    if TEMPLATE_ARGUMENTS in columns:
        return f"set these values in a chat template of your own (--chat_template_path FILE), or {ignoring}"
    if "margin" in columns:
        return f"margins belong to pairs of chosen and rejected; {ignoring}"
    if any(name in _TOKEN_IDS for name in columns):
        return f"{ignoring} these token ids, and on the texts"
    if "tools" in columns:
        return (
            f"tools need messages, which a chat template renders: give prompt, chosen, rejected as such; or {ignoring}"
        )
    return (
        "make it part of the column prompt: rename it, or join several to one text, or to a list of messages such as "
        f'[{{"role": "system", "content": "..."}}, {{"role": "user", "content": "..."}}]; or {ignoring}'
    )


def _has_other_meaning(name: str, value: Any) -> bool:
    if name == TEMPLATE_ARGUMENTS:
        if isinstance(value, str):
            return value.strip() not in {"", "{}", "null"}
        return any(part is not None for part in value.values()) if isinstance(value, Mapping) else bool(value)
    return (name == "margin" or name in _TOKEN_IDS) and value is not None


def _is_unread(name: str, value: Any, group: PreferenceGroup) -> bool:
    if value is None or isinstance(value, bool | int | float) or not holds_context(name):
        return False
    if name == "tools" and group.is_conversational:
        return False
    if _words(name) & _MEDIA_WORDS:
        return bool(value) if isinstance(value, str | list) else True
    if name == "tools":
        return bool(value.strip() not in {"", "[]", "null"} if isinstance(value, str) else value)
    pieces = list(_pieces(value))
    if not pieces:
        return False
    texts = [_flat(group.prompt) + _flat(response) for response in group.responses]
    known = " ".join(" ".join(texts).split())
    return not all(" ".join(piece.split()) in known for piece in pieces)


def _flat(text: Any) -> str:
    return text if isinstance(text, str) else " ".join(_pieces(text)) + " "


def _pieces(value: Any) -> Iterator[str]:
    """Yield the texts inside a value that aren't blank; of messages, and of JSON text, those of its parts."""
    if isinstance(value, str):
        parsed = _parsed(value)
        if parsed is not None:
            yield from _pieces(parsed)
        elif value.strip():
            yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key not in _NO_TEXT:
                yield from _pieces(part)
    elif isinstance(value, list):
        for part in value:
            yield from _pieces(part)


def _parsed(text: str) -> Any:
    """Return the list or object that a text is the JSON of, or `None`."""
    if text.lstrip()[:1] not in {"[", "{"}:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")
