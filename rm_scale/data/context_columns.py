"""Find columns that are not read although they seem to hold what the responses answer, or change what is trained on.

A file whose question stands in `instruction`, beside `chosen` and `rejected`, would train on answers without their
question. What is repeated in the texts that are read (as in UltraFeedback's `messages`) is no loss.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rm_scale.data.preference_group import PreferenceGroup, Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row

# fmt: off
# A name with one of these, or its plural, seems to hold context wherever the word stands in it.
_CONTEXT_WORDS = frozenset([
    "instruction", "question", "input", "query", "context", "system", "history", "prompt", "conversation", "messages",
    "dialog", "dialogue", "turns", "passage", "document", "problem", "tools", "systemprompt", "userprompt",
])
# A name that ends with one of these does, or with its plural: user_message, and not message_length.
_LAST_WORDS = frozenset([
    "message", "article", "post", "story", "background", "premise", "persona", "developer", "function", "request",
    "paragraph", "excerpt", "transcript", "scenario", "chat",
])
# A column that is called just so holds context if its text has more than one word; else it may name a kind or a person.
_VAGUE_NAMES = frozenset(["task", "user", "turn", "tool", "function", "request", "post", "developer", "persona"])
_OF_TOOLS = frozenset(["definition", "schema", "description", "specification", "declaration"])
_MEDIA_WORDS = frozenset(["image", "audio", "video"])
# A name with one of these tells about the context, and does not hold it: prompt_id, num_turns, question_source.
_LABEL_WORDS = frozenset([
    "id", "ids", "idx", "index", "hash", "source", "name", "type", "kind", "category", "topic", "lang", "language",
    "len", "length", "count", "num", "number", "n", "url", "score", "scores", "rating", "ratings", "model", "token",
    "tokens", "time", "date", "label", "labels", "path", "split", "version", "template", "error", "annotator",
])
# Not at the beginning of one: source_document, model_input. An image may be named by where it lies: image_url.
_BEFORE_CONTEXT = frozenset(["source", "model"])
_PLACE_WORDS = frozenset(["url", "path"])
# fmt: on
# Columns to which TRL's RewardTrainer gives a meaning that is not theirs here.
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
TOKEN_IDS = ("chosen_ids", "rejected_ids", "chosen_input_ids", "rejected_input_ids")
# Entries of a message that are no text of it.
_NO_TEXT = frozenset(["role", "from", "type", "id", "name"])
_ASSISTANT_ROLES = ("assistant", "gpt", "chatgpt", "bot", "model")
# Shorter ones stand in a line by chance: "5" in "Add 5 to the input".
_SHORT_BYTES = 12
_BETWEEN_PARTS = re.compile(r"\n|<[^<>\n]*>|\[/?[A-Z_]+\]")
_SPEAKER = re.compile(r"^\s*[^:\n]{1,20}:")


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
def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))


def _with_singular(word: str) -> set[str]:
    if word == "systems" or not word.endswith("s") or word.endswith("ss"):
        return {word}  # systems are compared with one another: a label
    return {word, word[:-1], f"{word[:-3]}y" if word.endswith("ies") else word}


@functools.lru_cache(maxsize=1 << 15)
def _holds_media(name: str) -> bool:
    words = _words(name)
    found = any(_with_singular(word) & _MEDIA_WORDS for word in words)
    return found and not (_LABEL_WORDS - _PLACE_WORDS) & set(words)


@functools.lru_cache(maxsize=1 << 15)
def holds_context(name: str) -> bool:
    """Tell whether a column of this name seems to hold what the responses answer."""
    words = _words(name)
    if not words or _holds_media(name):
        return bool(words)
    labels = _LABEL_WORDS & set(words)
    if words[-1] in _LABEL_WORDS or labels - _BEFORE_CONTEXT:
        return False
    forms = {form for word in words for form in _with_singular(word)}
    if forms & {"tool", "function"} and forms & _OF_TOOLS:
        return True
    return bool(forms & _CONTEXT_WORDS or _with_singular(words[-1]) & _LAST_WORDS) or name.lower() in _VAGUE_NAMES


def refuse_unread_context(row: Row, group: PreferenceGroup, read: Collection[str]) -> None:
    """Refuse a row of which a column holds context that is not part of the group's texts.

    Args:
        row: names and values.
        group: what was read of them.
        read: columns that the format reads.

    Raises:
        UnreadContext: names the columns.
    """
    unread = [(name, value) for name, value in row.items() if name not in read]
    if not unread:
        return
    texts = _Texts(group.prompt, group.responses)
    found = [name for name, value in unread if (_has_other_meaning(name, value) or _is_unread(name, value, texts))]
    if found:
        raise UnreadContext(found, f"{found[0]} holds {_shown(row[found[0]])}, which is not read")


def refuse_unread_beside(
    row: Row, prompt: Text, completions: Sequence[Text], read: Collection[str], fix: str, any_answer: bool = False
) -> None:
    """Refuse a row to score of which a column holds context, by the names and rules of training.

    Args:
        row: names and values.
        prompt: text or messages, as read.
        completions: texts or messages to be scored.
        read: columns that these come from, and those of which the user has said what they are.
        fix: what to do; `{names}` stands for the columns.
        any_answer: an assistant's turn in another column may be another answer, which is no context.

    Raises:
        UnreadContext: names the columns.
    """
    texts = _Texts(prompt, completions, any_answer)
    found = [
        name
        for name, value in row.items()
        if name not in read
        and ((name == TEMPLATE_ARGUMENTS and _has_other_meaning(name, value)) or _is_unread(name, value, texts))
    ]
    if found:
        told = f"{found[0]} holds {_shown(row[found[0]])}, which is not read"
        raise UnreadContext(found, f"{told}. Fix: {fix.format(names=' '.join(found))}")


def refuse_unread_text(row: Row, prompt: Text, completions: Sequence[Text], fix: str) -> None:
    """Refuse a row that brings a whole `text` beside what is scored, unless it is the same text.

    Raises:
        UnreadContext: it is another one.
    """
    value = row.get("text")
    if not isinstance(value, str) or not value.strip():
        return
    text = _flat(value)
    parts = [_flat(part) for one in (prompt, *completions) for part in _pieces_of(one)]
    if not all(part in text for part in parts) and not _Texts(prompt, completions).hold(value):
        told = f"text holds {_shown(value)}, which is not what is scored"
        raise UnreadContext(["text"], f"{told}. Fix: {fix.format(names='text')}")


def advice(columns: Sequence[str]) -> str:
    """Return how rows with such columns can be read."""
    ignoring = f"--ignore_columns {' '.join(columns)} to train without"
    if TEMPLATE_ARGUMENTS in columns:
        return f"set these values in a chat template of your own (--chat_template_path FILE), or {ignoring}"
    if "margin" in columns:
        return f"margins belong to pairs of chosen and rejected; {ignoring}"
    if any(name in TOKEN_IDS for name in columns):
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
    return (name == "margin" or name in TOKEN_IDS) and value is not None


class _Texts:
    """What is read of a row, in the forms that context is looked for in.

    Args:
        prompt: text or messages.
        responses: texts or messages.
        any_answer: what an assistant says in another column needs not be among them.
    """

    def __init__(self, prompt: Text, responses: Sequence[Text], any_answer: bool = False) -> None:
        self.prompt = prompt
        self.responses = responses
        self.any_answer = any_answer
        self.is_conversational = any(not isinstance(text, str) for text in (prompt, *responses))

    @functools.cached_property
    def asked(self) -> frozenset[str]:
        """The parts of the prompt: messages, lines, turns of a dialogue in one text."""
        return frozenset(part for text in _pieces_of(self.prompt) for part in _parts(text))

    @functools.cached_property
    def said(self) -> frozenset[str]:
        """The same of the responses."""
        return frozenset(part for one in self.responses for text in _pieces_of(one) for part in _parts(text))

    @functools.cached_property
    def whole(self) -> tuple[str, ...]:
        """The prompt with each response, white space made equal."""
        return tuple(_flat(_joined(self.prompt) + _joined(response)) for response in self.responses)

    @functools.cached_property
    def prompt_length(self) -> int:
        """Where the response begins in each of `whole`, about."""
        return len(_flat(_joined(self.prompt)))

    def hold(self, piece: str, by_assistant: bool = False, short_too: bool = False) -> bool:
        """Tell whether a text is part of what is read: a whole part of it, or words that begin inside the prompt.

        Args:
            piece: any text.
            by_assistant: it may be a response as well.
            short_too: look for a short text inside lines too, where it may stand by chance.
        """
        if by_assistant and self.any_answer:
            return True
        flat = _flat(piece)
        if flat in self.asked or (by_assistant and flat in self.said):
            return True
        if len(flat.encode("utf-8", "surrogatepass")) < _SHORT_BYTES and not short_too:
            return False
        return any(_begins_before(flat, text, max(1, self.prompt_length)) for text in self.whole)


def _is_unread(name: str, value: Any, texts: _Texts) -> bool:
    if value is None or isinstance(value, bool | int | float) or not holds_context(name):
        return False
    if name == "tools" and texts.is_conversational:
        return False
    if _holds_media(name):
        return bool(value) if isinstance(value, str | list) else True
    if name == "tools":
        return bool(value.strip() not in {"", "[]", "null"} if isinstance(value, str) else value)
    if name.lower() in _VAGUE_NAMES and isinstance(value, str) and len(value.split()) < 2:
        return False
    return not all(texts.hold(piece, by_assistant, short_too=name == "prompt") for piece, by_assistant in _turns(value))


def _turns(value: Any) -> Iterator[tuple[str, bool]]:
    """Yield the texts inside a value, each with whether it is said by the assistant."""
    parsed = _parsed(value) if isinstance(value, str) else value
    if not isinstance(parsed, list | Mapping):
        yield from ((piece, False) for piece in _pieces(value))
        return
    for part in [parsed] if isinstance(parsed, Mapping) else parsed:
        role = part.get("role", part.get("from")) if isinstance(part, Mapping) else None
        yield from ((piece, role in _ASSISTANT_ROLES) for piece in _pieces(part))


def _begins_before(piece: str, text: str, end: int) -> bool:
    """Tell whether a text holds a piece, cut at words, that begins before a place."""
    start = text.find(piece)
    while 0 <= start < end:
        after = start + len(piece)
        if not same_word(text[start - 1 : start], piece[:1]) and not same_word(piece[-1:], text[after : after + 1]):
            return True
        start = text.find(piece, start + 1)
    return False


def same_word(before: str, after: str) -> bool:
    """Tell whether two neighbouring characters belong to one word; scripts such as Chinese put no space between."""
    return before.isalnum() and after.isalnum() and "Lo" not in {unicodedata.category(one) for one in (before, after)}


def _flat(text: str) -> str:
    return " ".join(text.split())


def _joined(text: Text) -> str:
    return text if isinstance(text, str) else " ".join(_pieces(text)) + " "


def _pieces_of(text: Text) -> Iterator[str]:
    """Yield the texts of what is read; a text is one, also where it is JSON."""
    yield from [text] if isinstance(text, str) else _pieces(text)


def _parts(text: str) -> Iterator[str]:
    yield _flat(text)
    for part in _BETWEEN_PARTS.split(text):
        yield _flat(part)
        yield _flat(_SPEAKER.sub("", part))


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
