"""Readers from a raw row (a dict of columns) to a `PreferenceGroup`, and the guess which reader a file needs.

Formats and the columns they read (further columns are ignored and named in a log line):

* `explicit_prompt`: `prompt`, `chosen`, `rejected`, all text.
* `implicit_prompt`: `chosen`, `rejected`, both whole texts; the prompt is what they share.
* `conversational`: `chosen`, `rejected` as lists of messages, with or without `prompt`; optional `tools`.
* `hh_text`: `chosen`, `rejected` as "\\n\\nHuman: ...\\n\\nAssistant: ..." texts.
* `ranked`: `prompt`, `responses` (or `completions`), and `ranks` (smallest is best) or `scores` (highest is best).
* `soft_label`: `prompt`, two responses (`chosen` and `rejected`, `response_0` and `response_1`, or `response_a` and
  `response_b`), and the probability that the first is better: `soft_label`, `chosen_probability` or
  `preference_probability`.

Pair formats also read an optional `margin` (a number >= 0). All carry `id` and the subset column along. A pair of
`score_chosen` and `score_rejected` is never turned into a margin: only the user knows whether its scale is one.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_scale.data.groups import Message, PreferenceGroup, RejectedRow, Text
from rm_scale.errors import DataError

Row = Mapping[str, Any]

RESPONSE_LIST_COLUMNS = ("responses", "completions")
SOFT_LABEL_COLUMNS = ("soft_label", "chosen_probability", "preference_probability")
PAIR_COLUMNS = (("chosen", "rejected"), ("response_0", "response_1"), ("response_a", "response_b"))
HH_HUMAN = "\n\nHuman:"
HH_ASSISTANT = "\n\nAssistant:"

# What each format needs: every inner tuple is a choice of which one column must be there.
NEEDED_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "explicit_prompt": (("prompt",), ("chosen",), ("rejected",)),
    "implicit_prompt": (("chosen",), ("rejected",)),
    "conversational": (("chosen",), ("rejected",)),
    "hh_text": (("chosen",), ("rejected",)),
    "ranked": (("prompt",), RESPONSE_LIST_COLUMNS, ("ranks", "scores")),
    "soft_label": (
        ("prompt",),
        tuple(first for first, _ in PAIR_COLUMNS),
        tuple(second for _, second in PAIR_COLUMNS),
        SOFT_LABEL_COLUMNS,
    ),
}
_COMMON_COLUMNS = {"id", "prompt", "chosen", "rejected", "margin"}


@dataclass(frozen=True)
class FormatVerdict:
    """Which format a source has, why, and which of its columns will not be read."""

    name: str
    why: str
    ignored_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowReader:
    """Turns the rows of one source into groups.

    Attributes:
        format: a key of `NEEDED_COLUMNS`.
        subset_column: column that names a row's subset; rows without it get "".
        source: name of the file or dataset, carried into every group.
    """

    format: str
    subset_column: str = "subset"
    source: str = ""

    def read(self, row: Any, index: int) -> PreferenceGroup:
        """Read and check one row.

        Args:
            row: the decoded row; anything but a mapping is refused.
            index: its index in the source, used as id when the row has none.

        Raises:
            RejectedRow: the row can't be used; the reason is one of `REJECTION_REASONS`.
        """
        if not isinstance(row, Mapping):
            raise RejectedRow("wrong_type", f"the row is {_kind(row)}, not an object with columns")
        group = READERS[self.format](row)
        _check_group(group)
        return PreferenceGroup(
            prompt=group.prompt,
            responses=group.responses,
            ranks=group.ranks,
            margin=group.margin,
            soft_label=group.soft_label,
            tools=group.tools,
            source=self.source,
            subset=_label_text(row.get(self.subset_column), self.subset_column),
            id=_label_text(row.get("id"), "id") or str(index),
        )


# --- Choosing a format ---------------------------------------------------------------------------------------------


def choose_format(
    asked: str, columns: Sequence[str], sample: Sequence[Row], source: str, subset_column: str
) -> FormatVerdict:
    """Decide how a source is read.

    Args:
        asked: `RunConfig.dataset_format`; "auto" guesses from the columns and the sample.
        columns: column names seen, in order.
        sample: the first readable rows.

    Raises:
        DataError: the asked format does not fit the columns, or none does; names the nearest one.
    """
    if asked == "auto":
        name, why = _detect(set(columns), sample)
        if name is None:
            raise DataError(_no_format_text(columns, source))
    else:
        name, why = asked, "dataset_format names it"
        if _missing_columns(name, set(columns)):
            raise DataError(_misfit_text(name, columns, sample, source))
    read = {column for choice in NEEDED_COLUMNS[name] for column in choice} | _COMMON_COLUMNS | {subset_column}
    if name in {"conversational", "ranked", "soft_label"}:
        read.add("tools")
    ignored = [column for column in columns if column not in read]
    if name == "implicit_prompt" and "prompt" in columns:
        ignored.append("prompt")
    return FormatVerdict(name, why, tuple(ignored))


def _detect(columns: set[str], sample: Sequence[Row]) -> tuple[str | None, str]:
    for name in ("soft_label", "ranked"):
        if not _missing_columns(name, columns):
            found = [c for choice in NEEDED_COLUMNS[name] for c in choice if c in columns]
            return name, f"the columns {', '.join(found)} are there"
    if not {"chosen", "rejected"} <= columns:
        return None, ""
    if _most(sample, lambda row: _is_list(row.get("chosen")) or _is_list(row.get("prompt"))):
        return "conversational", "chosen, rejected or prompt are lists of messages"
    if "prompt" in columns:
        if _most(sample, _repeats_prompt, share=1.0):
            return "implicit_prompt", "chosen and rejected already begin with the text of prompt"
        return "explicit_prompt", "prompt, chosen and rejected are text"
    if _most(sample, lambda row: _is_hh(row.get("chosen")) and _is_hh(row.get("rejected"))):
        return "hh_text", "chosen and rejected are '\\n\\nHuman: ... \\n\\nAssistant: ...' texts"
    return "implicit_prompt", "chosen and rejected are text and there is no prompt column"


def _most(sample: Sequence[Row], test: Callable[[Row], bool], share: float = 0.5) -> bool:
    """Majority vote over the rows that have both sides at all, so that a few dirty first rows don't decide."""
    rows = [row for row in sample if row.get("chosen") is not None and row.get("rejected") is not None]
    hits = sum(test(row) for row in rows)
    return bool(rows) and (hits == len(rows) if share == 1.0 else hits > share * len(rows))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_hh(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(HH_HUMAN) and HH_ASSISTANT in value


def _repeats_prompt(row: Row) -> bool:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str) and prompt.strip()):
        return False
    return chosen.startswith(prompt) and rejected.startswith(prompt)


def _missing_columns(name: str, columns: set[str]) -> list[str]:
    missing = [" or ".join(choice) for choice in NEEDED_COLUMNS[name] if not columns & set(choice)]
    if name == "soft_label" and not missing and not any(columns >= set(pair) for pair in PAIR_COLUMNS):
        missing.append("both responses of one kind, e.g. chosen and rejected")
    return missing


def _needs(name: str) -> str:
    return ", ".join(" or ".join(choice) for choice in NEEDED_COLUMNS[name])


def _nearest_format(columns: Sequence[str]) -> str:
    def distance(name: str) -> tuple[int, int]:
        return len(_missing_columns(name, set(columns))), -len(NEEDED_COLUMNS[name])

    return min(NEEDED_COLUMNS, key=distance)


def _misfit_text(name: str, columns: Sequence[str], sample: Sequence[Row], source: str) -> str:
    detected, why = _detect(set(columns), sample)
    nearest = detected or _nearest_format(columns)
    because = f" ({why})" if detected else f" (needs {_needs(nearest)})"
    return (
        f"dataset_format={name}: {source} has the columns {', '.join(columns) or 'none'}, but {name} needs "
        f"{_needs(name)}; missing: {', '.join(_missing_columns(name, set(columns)))}. "
        f"The nearest format is {nearest}{because}. Fix: --dataset_format {nearest if detected else 'auto'}, "
        "or rename the columns."
    )


def _no_format_text(columns: Sequence[str], source: str) -> str:
    nearest = _nearest_format(columns)
    missing = _missing_columns(nearest, set(columns))
    hints = []
    for column in (part for choice in missing for part in choice.split(" or ")):
        close = difflib.get_close_matches(column, columns, n=1, cutoff=0.6)
        if close:
            hints.append(f"is '{close[0]}' meant to be '{column}'?")
    all_needs = "; ".join(f"{name}: {_needs(name)}" for name in NEEDED_COLUMNS)
    return (
        f"{source}: no known format fits the columns {', '.join(columns) or 'none'}. Formats and the columns they "
        f"need: {all_needs}. The nearest format is {nearest}, which misses {', '.join(missing)}. "
        f"Fix: rename the columns{' - ' + ' '.join(hints) if hints else ''}."
    )


# --- Readers -------------------------------------------------------------------------------------------------------


def _read_explicit(row: Row) -> PreferenceGroup:
    prompt = _text(row, "prompt")
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    _refuse_empty_prompt(prompt)
    return _pair(prompt, chosen, rejected, row)


def _read_implicit(row: Row) -> PreferenceGroup:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise RejectedRow("identical_responses")
    cut = _shared_prompt_length(chosen, rejected)
    return _pair(chosen[:cut], chosen[cut:], rejected[cut:], row)


def _read_hh(row: Row) -> PreferenceGroup:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise RejectedRow("identical_responses")
    start = chosen[: _shared_length(chosen, rejected)].rfind(HH_ASSISTANT)
    if start < 0:
        raise RejectedRow("prompt_mismatch", "chosen and rejected differ before the first '\\n\\nAssistant:'")
    cut = start + len(HH_ASSISTANT)
    # One side alone may have made up a further human turn; when both go on, they answer different conversations.
    if HH_HUMAN in chosen[cut:] and HH_HUMAN in rejected[cut:]:
        raise RejectedRow("prompt_mismatch", f"the conversations part at character {cut}, before their last turn")
    return _pair(chosen[:cut], chosen[cut:], rejected[cut:], row)


def _read_conversational(row: Row) -> PreferenceGroup:
    prompt, tools = row.get("prompt"), _tools(row)
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if prompt is None:
        prompt, (chosen, rejected) = _split_shared_messages(chosen, rejected)
    elif isinstance(prompt, str):
        prompt, (chosen, rejected) = _join_text_prompt(prompt, [chosen, rejected])
    else:
        prompt = _messages(row, "prompt")
        chosen, rejected = _without_prompt(prompt, chosen), _without_prompt(prompt, rejected)
    return _pair(prompt, chosen, rejected, row, tools)


def _read_ranked(row: Row) -> PreferenceGroup:
    column = _first_present(row, RESPONSE_LIST_COLUMNS)
    responses = row[column]
    if not isinstance(responses, list):
        raise RejectedRow("wrong_type", f"{column} is {_kind(responses)}, not a list of responses")
    if len(responses) < 2:
        raise RejectedRow("no_preference", f"{column} has {len(responses)} element(s), not 2 or more")
    prompt, parts = _prompt_and_responses(row, responses, column)
    ranks = _ranks(row, len(parts))
    return PreferenceGroup(prompt, tuple(parts), ranks, tools=_tools(row))


def _read_soft_label(row: Row) -> PreferenceGroup:
    names = next((pair for pair in PAIR_COLUMNS if all(row.get(name) is not None for name in pair)), None)
    if names is None:
        raise RejectedRow("missing_key", f"no two responses, e.g. {PAIR_COLUMNS[0]} or {PAIR_COLUMNS[1]}")
    column = _first_present(row, SOFT_LABEL_COLUMNS)
    probability = _number(row[column], column)
    if not 0 <= probability <= 1:
        raise RejectedRow("bad_label", f"{column}={probability} is not a probability in [0, 1]")
    prompt, parts = _prompt_and_responses(row, [row[name] for name in names], " and ".join(names))
    ranks = (0, 0) if probability == 0.5 else (0, 1) if probability > 0.5 else (1, 0)
    return PreferenceGroup(prompt, tuple(parts), ranks, soft_label=probability, tools=_tools(row))


READERS: dict[str, Callable[[Row], PreferenceGroup]] = {
    "explicit_prompt": _read_explicit,
    "implicit_prompt": _read_implicit,
    "conversational": _read_conversational,
    "hh_text": _read_hh,
    "ranked": _read_ranked,
    "soft_label": _read_soft_label,
}


def _pair(prompt: Text, chosen: Text, rejected: Text, row: Row, tools: list[Any] | None = None) -> PreferenceGroup:
    return PreferenceGroup(prompt, (chosen, rejected), (0, 1), margin=_margin(row), tools=tools)


# --- Values --------------------------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _first_present(row: Row, names: Sequence[str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    raise RejectedRow("missing_key", " or ".join(names))


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise RejectedRow("missing_key", column)
    if not isinstance(value, str):
        raise RejectedRow("wrong_type", f"{column} is {_kind(value)}, not text")
    return value


def _label_text(value: Any, column: str) -> str:
    """Id and subset may be text or numbers; nothing else is turned into text silently."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RejectedRow("wrong_type", f"{column} is {_kind(value)}, not text or a number")
    # Table libraries store whole numbers as floats as soon as one row has none.
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    _check_unicode(text, column)
    return text


def _number(value: Any, column: str) -> float:
    if value is None:
        raise RejectedRow("bad_label", f"{column} holds null")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RejectedRow("wrong_type", f"{column} holds {_kind(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RejectedRow("bad_label", f"{column}={number} is not finite")
    return number


def _margin(row: Row) -> float | None:
    if row.get("margin") is None:
        return None
    margin = _number(row["margin"], "margin")
    if margin < 0:
        raise RejectedRow("bad_label", f"margin={margin} is negative: chosen would be the worse response")
    return margin


def _ranks(row: Row, num_responses: int) -> tuple[int, ...]:
    """Ranks from 0 (best) without gaps, from `ranks` (smallest is best) or `scores` (highest is best)."""
    column = _first_present(row, ("ranks", "scores"))
    values = row[column]
    if not isinstance(values, list):
        raise RejectedRow("wrong_type", f"{column} is {_kind(values)}, not a list of numbers")
    if len(values) != num_responses:
        raise RejectedRow("bad_label", f"{column} has {len(values)} values for {num_responses} responses")
    numbers = [_number(value, column) for value in values]
    if column == "ranks" and any(number != int(number) for number in numbers):
        raise RejectedRow("bad_label", f"ranks={values} are not whole numbers (are they scores?)")
    places = sorted(set(numbers), reverse=column == "scores")
    return tuple(places.index(number) for number in numbers)


def _shared_length(first: str, second: str) -> int:
    """Length of the longest common prefix."""
    length = min(len(first), len(second))
    return next((place for place in range(length) if first[place] != second[place]), length)


def _shared_prompt_length(chosen: str, rejected: str) -> int:
    """Length of the longest common prefix, cut back to where a response can begin.

    The cut is after the last line break, or else before the last white space, as byte-level tokens begin with one.
    Each response keeps at least one character.
    """
    shared = chosen[: min(_shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)]
    if "\n" in shared:
        return shared.rindex("\n") + 1
    spaces = list(re.finditer(r"\s+", shared))
    return spaces[-1].start() if spaces else 0


# --- Conversations -------------------------------------------------------------------------------------------------


def _tools(row: Row) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise RejectedRow("wrong_type", f"tools is text that isn't JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise RejectedRow("wrong_type", f"tools is {_kind(tools)}, not a list")
    _check_unicode_inside(tools, "tools")
    # An empty list makes some templates (Llama) write their tool preamble.
    return _without_none(tools) or None


def _without_none(value: Any) -> Any:
    """Drop null entries: Parquet and Arrow fill every struct with the keys of all others."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_none(part) for part in value]
    return value


def _messages(row: Row, column: str) -> list[Message]:
    value = row.get(column)
    if value is None:
        raise RejectedRow("missing_key", column)
    return _as_messages(value, column)


def _as_messages(value: Any, column: str) -> list[Message]:
    """A list of messages; a bare text is what the assistant says."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RejectedRow("wrong_type", f"{column} is {_kind(value)}, not a list of messages")
    if not value:
        raise RejectedRow("empty", f"{column} has no messages")
    return [_message(part, f"{column}[{number}]") for number, part in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise RejectedRow("wrong_type", f"{where} is {_kind(value)}, not a message")
    message: Message = _without_none(value)
    if not isinstance(message.get("role"), str):
        raise RejectedRow("bad_conversation", f"{where} has no role")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise RejectedRow("bad_conversation", f"{where} has neither content nor tool calls")
    if not (content is None or isinstance(content, str) or _is_text_parts(content)):
        raise RejectedRow("wrong_type", f"{where} has content that is neither text nor a list of text parts")
    _check_unicode_inside(message, where)
    return message


def _is_text_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


def message_text(message: Message) -> str:
    """The text of a message, whether its content is text or a list of text parts."""
    content = message.get("content")
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _split_shared_messages(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], tuple[list[Message], list[Message]]]:
    """Prompt = the messages both conversations share; each response keeps at least one message."""
    if chosen == rejected:
        raise RejectedRow("identical_responses")
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    if not any(message["role"] == "user" for message in chosen[:count]):
        raise RejectedRow("prompt_mismatch", f"the conversations share {count} messages and no user turn")
    return chosen[:count], (chosen[count:], rejected[count:])


def _without_prompt(prompt: list[Message], messages: list[Message]) -> list[Message]:
    """Some files repeat the prompt in the responses; a continuation can't, since roles alternate."""
    repeated = len(messages) > len(prompt) and messages[: len(prompt)] == prompt
    return messages[len(prompt) :] if repeated else messages


def _join_text_prompt(prompt: str, responses: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """A text prompt beside messages: the user's turn, or (as in UltraFeedback) a copy of one that the messages hold."""
    _refuse_empty_prompt(prompt)
    _check_unicode(prompt, "prompt")
    if all(messages[0]["role"] == "assistant" for messages in responses):
        return [{"role": "user", "content": prompt}], responses
    first, *others = responses
    count = 0
    while all(
        len(messages) - 1 > count and len(first) - 1 > count and messages[count] == first[count] for messages in others
    ):
        count += 1
    shared = first[:count]
    if not any(message["role"] == "user" and message_text(message) == prompt for message in shared):
        raise RejectedRow("prompt_mismatch", "the shared messages don't hold the text of the prompt column")
    return shared, [messages[count:] for messages in responses]


def _prompt_and_responses(row: Row, responses: Sequence[Any], column: str) -> tuple[Text, list[Text]]:
    """Prompt and K responses of one kind: all text, or messages as soon as any of them is a list."""
    prompt = row.get("prompt")
    if prompt is None:
        raise RejectedRow("missing_key", "prompt")
    if not isinstance(prompt, str | list):
        raise RejectedRow("wrong_type", f"prompt is {_kind(prompt)}, neither text nor messages")
    texts = [part for part in responses if isinstance(part, str)]
    if isinstance(prompt, str) and (texts or not responses):
        if len(texts) != len(responses):
            raise RejectedRow("wrong_type", f"{column} mixes text with other values")
        _refuse_empty_prompt(prompt)
        return prompt, list(texts)
    conversations = [_as_messages(part, f"{column}[{number}]") for number, part in enumerate(responses)]
    if isinstance(prompt, str):
        messages, conversations = _join_text_prompt(prompt, conversations)
        return messages, list(conversations)
    messages = _messages(row, "prompt")
    return messages, [_without_prompt(messages, part) for part in conversations]


# --- Checks --------------------------------------------------------------------------------------------------------


def _refuse_empty_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise RejectedRow("empty", "the prompt has no text")


def _check_unicode(text: str, where: str) -> None:
    if "\x00" in text:
        raise RejectedRow("bad_unicode", f"{where} holds a NUL character at {text.index(chr(0))}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedRow("bad_unicode", f"{where} holds a lone surrogate at {error.start}") from None


def _check_unicode_inside(value: Any, where: str) -> None:
    if isinstance(value, str):
        _check_unicode(value, where)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check_unicode_inside(key, where)
            _check_unicode_inside(part, where)
    elif isinstance(value, list):
        for part in value:
            _check_unicode_inside(part, where)


def _check_group(group: PreferenceGroup) -> None:
    """The rules that hold for every format."""
    if group.is_conversational:
        _check_conversations(group)
    else:
        _check_texts(group)
    if all(response == group.responses[0] for response in group.responses[1:]):
        raise RejectedRow("identical_responses")
    if len(set(group.ranks)) < 2 and group.soft_label is None:
        raise RejectedRow("no_preference", f"every response has the same rank: {list(group.ranks)}")


def _check_texts(group: PreferenceGroup) -> None:
    assert isinstance(group.prompt, str)
    _check_unicode(group.prompt, "prompt")
    for number, response in enumerate(group.responses):
        assert isinstance(response, str)
        _check_unicode(response, f"response {number}")
        if not response.strip():
            raise RejectedRow("empty", f"response {number} has no text")


def _check_conversations(group: PreferenceGroup) -> None:
    assert isinstance(group.prompt, list)
    for number, response in enumerate(group.responses):
        assert isinstance(response, list)
        check_conversation(group.prompt + response)
        last = response[-1]
        if last["role"] != "assistant":
            raise RejectedRow("bad_conversation", f"response {number} ends with {last['role']}, not assistant")
        if not message_text(last).strip() and not last.get("tool_calls"):
            raise RejectedRow("empty", f"response {number} ends with an empty message")


def check_conversation(messages: Sequence[Message]) -> None:
    """Roles must alternate: [system] user assistant [tool ... assistant] user assistant ...

    Raises:
        RejectedRow: `bad_conversation`, saying which message breaks the rule.
    """
    allowed = {"system", "developer", "user"}
    before = "the start"
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in allowed:
            wanted = " or ".join(sorted(allowed))
            raise RejectedRow("bad_conversation", f"message {number} is {role} after {before}: expected {wanted}")
        before = role
        allowed = _roles_after(message)


def _roles_after(message: Message) -> set[str]:
    match message["role"]:
        case "system" | "developer":
            return {"user"}
        case "user":
            return {"assistant"}
        case "tool":
            return {"tool", "assistant"}
        case _:
            return {"tool"} if message.get("tool_calls") else {"user"}
