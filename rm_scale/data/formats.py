"""The formats of preference rows, and the readers from a raw row (a dict of columns) to a `PreferenceGroup`.

Formats and the columns they read (further columns are ignored and named in a log line):

* `explicit_prompt`: `prompt`, `chosen`, `rejected`, all text. A prompt that both responses repeat is read once.
* `implicit_prompt`: `chosen`, `rejected`, both whole texts; the prompt is what they share.
* `conversational`: `chosen`, `rejected` as lists of messages, with or without `prompt`; optional `tools`. ShareGPT's
  `conversations`, `from` and `value` are read too. A text that is the JSON of messages counts as messages.
* `hh_text`: `chosen`, `rejected` as "\\n\\nHuman: ...\\n\\nAssistant: ..." texts.
* `ranked`: `prompt`, `responses` (or `completions`), and `ranks` (smallest is best) or `scores` (highest is best).
* `soft_label`: `prompt`, two responses (`chosen` and `rejected`, `response_0` and `response_1`, or `response_a` and
  `response_b`), and the probability that the first is better: `soft_label`, `chosen_probability` or
  `preference_probability`; or `better_response_id`, the number (0 or 1) of the better one of `response_0` and
  `response_1`, or of `response_a` and `response_b`, which is no soft label.

Pair formats and `better_response_id` also read an optional `margin` (a number >= 0), and every format `id` and the
subset column. The columns `score_chosen` and `score_rejected` are never turned into a margin: only the user knows
whether their scale is one.

Which format a file has is decided in `rm_scale.data.format_detection`. To add one: a reader, its entry in `READERS` and
`NEEDED_COLUMNS`, and a rule of detection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_scale.config_sources import ColumnFilter
from rm_scale.data.column_maps.column_map import ColumnMap, with_first_row
from rm_scale.data.common_prefix import common_prefix_length
from rm_scale.data.context_columns import refuse_unread_context, same_word
from rm_scale.data.conversations import (
    as_messages,
    check_answered,
    join_text_prompt,
    json_messages,
    message_text,
    read_messages,
    read_tools,
    split_shared_messages,
    without_prompt,
)
from rm_scale.data.preference_group import PreferenceGroup, Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_filters import leave_out_filtered
from rm_scale.data.row_values import (
    Row,
    check_no_nul,
    check_unicode,
    first_present,
    kind_name,
    label_text,
    margin_value,
    number_value,
    rank_values,
    refuse_empty_prompt,
    text_value,
)

RESPONSE_LIST_COLUMNS = ("responses", "completions")
MAX_RESPONSES = 1_000
SOFT_LABEL_COLUMNS = ("soft_label", "chosen_probability", "preference_probability")
BETTER_COLUMN = "better_response_id"
PAIR_COLUMNS = (("chosen", "rejected"), ("response_0", "response_1"), ("response_a", "response_b"))
_TEXT_COLUMNS = tuple(name for pair in PAIR_COLUMNS for name in pair)
# A response may begin with a prompt of one word of fewer characters by chance: "Hello".
_FEW_CHARACTERS = 12
HH_HUMAN = "\n\nHuman:"
HH_ASSISTANT = "\n\nAssistant:"

# The columns each format needs. An inner tuple names alternatives, of which one must be there.
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
        (*SOFT_LABEL_COLUMNS, BETTER_COLUMN),
    ),
}

TEXT_FORMATS = ("explicit_prompt", "implicit_prompt", "hh_text")
_WITHOUT_PROMPT = ("implicit_prompt", "hh_text")
_WITHOUT_MARGIN = ("ranked", "soft_label")
# Columns that are not reported as ignored in any format.
COMMON_COLUMNS = {"id", "prompt", "chosen", "rejected", "margin"}


def fits_a_format(columns: Collection[str]) -> bool:
    """Tell whether columns are those of a format, so that rows need no map."""
    names = set(columns)
    return any(all(names & set(choice) for choice in needed) for needed in NEEDED_COLUMNS.values())


@dataclass(frozen=True)
class RowReader:
    """Turns the rows of one source into groups.

    Attributes:
        format: a key of `NEEDED_COLUMNS`.
        subset_column: column that names a row's subset; rows without it get "".
        source: name of the file or dataset, carried into every group.
        ignore_columns: columns that are not read, whatever their name.
        checks_context: refuse rows with context in a column that the format does not read.
        column_map: rewrites a row in the columns of the format before it is read.
        filters: what a row's own columns must hold; other rows are left out as `FILTERED`.
    """

    format: str
    subset_column: str = "subset"
    source: str = ""
    ignore_columns: tuple[str, ...] = ()
    checks_context: bool = True
    column_map: ColumnMap | None = None
    filters: tuple[ColumnFilter, ...] = ()

    def read(self, row: Any, index: int) -> PreferenceGroup:
        """Read and check one row.

        Args:
            row: the decoded row; anything but a mapping is refused.
            index: its index in the source, which becomes the id of a row without one.

        Raises:
            RejectedRow: the row can't be used; the reason is one of `REJECTION_REASONS`.
        """
        if not isinstance(row, Mapping):
            raise RejectedRow("wrong_type", f"the row is {kind_name(row)}, not an object with columns")
        if self.filters:
            leave_out_filtered(row, self.filters)
        if self.ignore_columns:
            row = {name: value for name, value in row.items() if name not in self.ignore_columns}
        if self.column_map is None or not self.column_map.regroups:
            return self._read(row, index)
        try:
            return self._read(row, index)
        except RejectedRow as rejected:
            raise with_first_row(rejected, row) from None

    def _read(self, raw: Row, index: int) -> PreferenceGroup:
        row = raw
        if self.column_map is not None:
            row = self._mapped(self.column_map, row)
        found, has_messages = _with_messages(row)
        format = self._format_of(row, has_messages)
        group = READERS[format](found)
        _check_group(group)
        if self.checks_context:
            if self.column_map is None:
                refuse_unread_context(row, group, self._read_columns(format, row))
            else:
                self._refuse_unmapped_context(self.column_map, raw, row, group)
        return PreferenceGroup(
            prompt=group.prompt,
            responses=group.responses,
            ranks=group.ranks,
            margin=group.margin,
            soft_label=group.soft_label,
            tools=group.tools,
            source=self.source,
            subset=label_text(row.get(self.subset_column), self.subset_column),
            id=label_text(row.get("id"), "id") or str(index),
        )

    def _mapped(self, column_map: ColumnMap, row: Row) -> Row:
        """Return a row in the columns of a format, with its subset and id where the map says nothing of them."""
        mapped = column_map.apply(row)
        require_few_responses(mapped)
        if "subset" in mapped:
            mapped[self.subset_column] = mapped.pop("subset")
        for name in (self.subset_column, "id"):
            if name not in mapped and not column_map.regroups and name not in column_map.columns_read:
                mapped[name] = row.get(name)
        return mapped

    def _format_of(self, row: Row, has_messages: bool) -> str:
        if self.column_map is not None and self.column_map.format == "ranked" and "response_0" in row:
            return "soft_label"  # the map says that two responses of equal scores are a tie
        return "conversational" if has_messages and self.format in TEXT_FORMATS else self.format

    def _refuse_unmapped_context(self, column_map: ColumnMap, raw: Row, row: Row, group: PreferenceGroup) -> None:
        """Refuse a row of which a column that its map does not read holds context."""
        read = {*column_map.columns_read, *self.ignore_columns, self.subset_column, "id"}
        unread = {name: value for name, value in column_map.columns_of(raw).items() if name not in read}
        refuse_unread_context({**unread, "tools": row.get("tools", unread.get("tools"))}, group, ())

    def _read_columns(self, format: str, row: Row) -> set[str]:
        read = {"id", "chosen", "rejected", self.subset_column}
        if format not in _WITHOUT_PROMPT:
            read.add("prompt")
        has_side = format == "soft_label" and all(row.get(name) is None for name in SOFT_LABEL_COLUMNS)
        if format not in _WITHOUT_MARGIN or has_side:
            read.add("margin")
        return read


def require_few_responses(row: Any) -> None:
    """Refuse a row whose pairs, which grow with the square of its responses, would keep a machine busy.

    Raises:
        RejectedRow: `too_many_responses`.
    """
    if not isinstance(row, Mapping):
        return
    for column in RESPONSE_LIST_COLUMNS:
        responses = row.get(column)
        if isinstance(responses, list) and len(responses) > MAX_RESPONSES:
            raise RejectedRow(
                "too_many_responses", f"{column} has {len(responses):,}, at most {MAX_RESPONSES:,} are read"
            )


def _with_messages(row: Row) -> tuple[Row, bool]:
    """Return the row with messages where a text is the JSON of them, and whether one of its texts was.

    Raises:
        RejectedRow: a text begins like messages and can't be read as such; or one response is a text, the other the
            JSON of messages, and which of them the user means can't be told.
    """
    read: dict[str, Any] = {}
    prompt = "prompt" if row.get("prompt") is not None else "conversations"
    for name in (prompt, *_TEXT_COLUMNS):
        if isinstance(row.get(name), str) and (messages := json_messages(row[name], name)) is not None:
            read[name] = messages
    for name in RESPONSE_LIST_COLUMNS:
        if isinstance(row.get(name), list):
            parts = [
                json_messages(part, f"{name}[{n}]") if isinstance(part, str) else None
                for n, part in enumerate(row[name])
            ]
            if any(part is not None for part in parts):
                read[name] = [old if part is None else part for old, part in zip(row[name], parts, strict=True)]
    if not read:
        return row, False
    found = {**row, **read}
    if not isinstance(found.get(prompt), list):
        for first, second in PAIR_COLUMNS:
            kinds = {name: isinstance(found.get(name), str) for name in (first, second)}
            if kinds[first] != kinds[second] and None not in (found.get(first), found.get(second)):
                text, other = (first, second) if kinds[first] else (second, first)
                raise RejectedRow("wrong_type", f"{other} is a conversation written as JSON, {text} is plain text")
    return found, True


# --- Readers -------------------------------------------------------------------------------------------------------


def _read_explicit(row: Row) -> PreferenceGroup:
    prompt = text_value(row, "prompt")
    chosen, rejected = text_value(row, "chosen"), text_value(row, "rejected")
    refuse_empty_prompt(prompt)
    chosen, rejected = without_text_prompt(prompt, [chosen, rejected])
    return _pair(prompt, chosen, rejected, row)


def without_text_prompt(prompt: str, responses: Sequence[str]) -> list[str]:
    """Drop the prompt from responses that all begin with it, as in files that hold whole texts beside the prompt.

    A short word, with which a response may begin by chance (a greeting), is dropped only where several responses agree.

    Raises:
        RejectedRow: `prompt_mismatch`, since only some of them do; which of them answer the prompt can't be told.
    """
    rests = [_after_prompt(prompt, response) for response in responses]
    whole = [rest for rest in rests if rest is not None]
    by_chance = len(prompt.split()) == 1 and len(prompt.strip()) < _FEW_CHARACTERS
    if len(whole) == len(responses) and not (by_chance and len(responses) == 1):
        return whole
    if whole and not by_chance:
        first = rests.index(whole[0])
        raise RejectedRow("prompt_mismatch", f"response {first} repeats the prompt at its beginning, and others don't")
    return list(responses)


def repeats_prompt(prompt: str, response: str) -> bool:
    """Tell whether a text begins with the whole prompt, whatever the white space between its words."""
    return _after_prompt(prompt, response) is not None


def _after_prompt(prompt: str, response: str) -> str | None:
    """Return what follows the prompt in a response that begins with it, cut between words; `None` for any other."""
    place = 0
    for number, word in enumerate(prompt.split()):
        start = place
        while response[place : place + 1].isspace():
            place += 1
        if (number and place == start) or not response.startswith(word, place):
            return None
        place += len(word)
    if place == 0 or same_word(response[place - 1], response[place : place + 1]):
        return None
    if response.startswith(prompt):
        return response[len(prompt) :]
    # The prompt brings its own white space.
    return response[place:].lstrip() if prompt[-1].isspace() else response[place:]


def _read_implicit(row: Row) -> PreferenceGroup:
    chosen, rejected = text_value(row, "chosen"), text_value(row, "rejected")
    if chosen == rejected:
        raise RejectedRow("identical_responses")
    cut = _shared_prompt_length(chosen, rejected)
    return _pair(chosen[:cut], chosen[cut:], rejected[cut:], row)


def _read_hh(row: Row) -> PreferenceGroup:
    chosen, rejected = text_value(row, "chosen"), text_value(row, "rejected")
    if chosen == rejected:
        raise RejectedRow("identical_responses")
    start = chosen[: shared_length(chosen, rejected)].rfind(HH_ASSISTANT)
    if start < 0:
        raise RejectedRow("prompt_mismatch", "chosen and rejected differ before the first '\\n\\nAssistant:'")
    cut = start + len(HH_ASSISTANT)
    # A model may have made up a further human turn in one response. If both have one, the dialogues differ before
    # their last turn, and chosen and rejected answer different prompts.
    if HH_HUMAN in chosen[cut:] and HH_HUMAN in rejected[cut:]:
        raise RejectedRow("prompt_mismatch", f"the conversations part at character {cut}, before their last turn")
    return _pair(chosen[:cut], chosen[cut:], rejected[cut:], row)


def _read_conversational(row: Row) -> PreferenceGroup:
    column = "conversations" if row.get("prompt") is None and isinstance(row.get("conversations"), list) else "prompt"
    prompt, tools = row.get(column), read_tools(row)
    chosen, rejected = read_messages(row, "chosen"), read_messages(row, "rejected")
    if prompt is None:
        prompt, (chosen, rejected) = split_shared_messages(chosen, rejected)
    elif isinstance(prompt, str):
        prompt, (chosen, rejected) = join_text_prompt(prompt, [chosen, rejected])
    else:
        prompt = read_messages(row, column)
        chosen, rejected = without_prompt(prompt, chosen), without_prompt(prompt, rejected)
    return _pair(prompt, chosen, rejected, row, tools)


def _read_ranked(row: Row) -> PreferenceGroup:
    column = first_present(row, RESPONSE_LIST_COLUMNS)
    responses = row[column]
    other = row.get(RESPONSE_LIST_COLUMNS[1])
    if other is not None and other != responses:
        names = " and ".join(RESPONSE_LIST_COLUMNS)
        raise RejectedRow("bad_label", f"{names} differ, and the label orders one of them. Fix: --ignore_columns NAME")
    if not isinstance(responses, list):
        raise RejectedRow("wrong_type", f"{column} is {kind_name(responses)}, not a list of responses")
    if len(responses) < 2:
        raise RejectedRow("no_preference", f"{column} has {len(responses)} element(s), not 2 or more")
    prompt, parts = _prompt_and_responses(row, responses, column)
    ranks = rank_values(row, len(parts))
    _refuse_other_order(row, ranks)
    return PreferenceGroup(prompt, tuple(parts), ranks, tools=read_tools(row))


def _read_soft_label(row: Row) -> PreferenceGroup:
    names = _response_pair(row)
    column = first_present(row, (*SOFT_LABEL_COLUMNS, BETTER_COLUMN))
    if column == BETTER_COLUMN:
        prompt, parts = _prompt_and_responses(row, [row[name] for name in names], " and ".join(names))
        margin = margin_value(row)
        return PreferenceGroup(prompt, tuple(parts), _ranks_of_better(row[column]), margin, tools=read_tools(row))
    probability = number_value(row[column], column)
    if not 0 <= probability <= 1:
        raise RejectedRow("bad_label", f"{column}={probability} is not a probability in [0, 1]")
    _refuse_other_labels(row, column, probability)
    prompt, parts = _prompt_and_responses(row, [row[name] for name in names], " and ".join(names))
    ranks = (0, 0) if probability == 0.5 else (0, 1) if probability > 0.5 else (1, 0)
    return PreferenceGroup(prompt, tuple(parts), ranks, soft_label=probability, tools=read_tools(row))


def _response_pair(row: Row) -> tuple[str, str]:
    """Return the columns of the two responses that the label of a row speaks of.

    Raises:
        RejectedRow: there is no such pair, or there are several; or the number of the better response stands beside
            `chosen` and `rejected`, which have no numbers: it was made for other columns.
    """
    pairs = [pair for pair in PAIR_COLUMNS if all(row.get(name) is not None for name in pair)]
    if not pairs:
        raise RejectedRow("missing_key", f"no two responses, e.g. {PAIR_COLUMNS[0]} or {PAIR_COLUMNS[1]}")
    if len(pairs) > 1:
        seen = ", and ".join(" and ".join(pair) for pair in pairs)
        raise RejectedRow(
            "bad_label",
            f"which responses the label speaks of can't be told: the row has {seen}. Fix: --ignore_columns "
            f"{' '.join(pairs[0])}, or those of the other pair and of its label",
        )
    if pairs[0] == PAIR_COLUMNS[0] and row.get(BETTER_COLUMN) is not None:
        raise RejectedRow(
            "bad_label",
            f"{BETTER_COLUMN} numbers response_0 and response_1 (or _a and _b), and the row has chosen and rejected. "
            f"Fix: --ignore_columns {BETTER_COLUMN}, or rename these two",
        )
    return pairs[0]


def _refuse_other_labels(row: Row, column: str, probability: float) -> None:
    """Refuse a row whose further columns with labels say something else than the one that is read."""
    for name in SOFT_LABEL_COLUMNS:
        if row.get(name) is not None and number_value(row[name], name) != probability:
            raise _two_labels(row, column, name)
    if row.get(BETTER_COLUMN) is not None:
        first_is_better = _ranks_of_better(row[BETTER_COLUMN]) == (0, 1)
        if probability != 0.5 and (probability > 0.5) != first_is_better:
            raise _two_labels(row, column, BETTER_COLUMN)


def _refuse_other_order(row: Row, ranks: Sequence[int]) -> None:
    """Refuse a row whose `scores` order the responses in another way than its `ranks`; ties may be broken by one."""
    if row.get("ranks") is None or row.get("scores") is None:
        return
    try:
        others = rank_values({"scores": row["scores"]}, len(ranks))
    except RejectedRow:
        return  # they are no labels of these responses
    in_order = [other for _, other in sorted(zip(ranks, others, strict=True))]
    if in_order != sorted(in_order):
        raise _two_labels(row, "ranks", "scores")


def _two_labels(row: Row, first: str, second: str) -> RejectedRow:
    return RejectedRow(
        "bad_label",
        f"{first} {str(row[first])[:40]} and {second} {str(row[second])[:40]} say different things. Fix: "
        f"--ignore_columns {second}, or {first}",
    )


def _ranks_of_better(value: Any) -> tuple[int, int]:
    """Return the ranks of two responses, of which the value numbers the better one from 0."""
    number = {"0": 0, "1": 1}.get(value.strip(), value) if isinstance(value, str) else value
    if isinstance(number, bool) or number not in (0, 1):
        raise RejectedRow(
            "bad_label", f"{BETTER_COLUMN}={value!r} is neither 0 nor 1, the number of the better response"
        )
    return (0, 1) if number == 0 else (1, 0)


READERS: dict[str, Callable[[Row], PreferenceGroup]] = {
    "explicit_prompt": _read_explicit,
    "implicit_prompt": _read_implicit,
    "conversational": _read_conversational,
    "hh_text": _read_hh,
    "ranked": _read_ranked,
    "soft_label": _read_soft_label,
}


def _pair(prompt: Text, chosen: Text, rejected: Text, row: Row, tools: list[Any] | None = None) -> PreferenceGroup:
    return PreferenceGroup(prompt, (chosen, rejected), (0, 1), margin=margin_value(row), tools=tools)


def shared_length(first: str, second: str) -> int:
    """Return the length of the longest common prefix of two texts."""
    return common_prefix_length([first, second])


def _shared_prompt_length(chosen: str, rejected: str) -> int:
    """Return the length of the longest common prefix, cut back to where a response can begin.

    That is after the last line break, or else before the last white space, with which byte-level tokens begin. Each
    response keeps at least one character.
    """
    shared = chosen[: min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)]
    if "\n" in shared:
        return shared.rindex("\n") + 1
    spaces = list(re.finditer(r"\s+", shared))
    return spaces[-1].start() if spaces else 0


def _prompt_and_responses(row: Row, responses: Sequence[Any], column: str) -> tuple[Text, list[Text]]:
    """Read the prompt and K responses as one kind: all text, or all messages as soon as one of them is a list.

    Args:
        row: has the prompt.
        responses: the raw values of the K responses.
        column: where they come from, for messages.
    """
    prompt = row.get("prompt")
    if prompt is None:
        raise RejectedRow("missing_key", "prompt")
    if not isinstance(prompt, str | list):
        raise RejectedRow("wrong_type", f"prompt is {kind_name(prompt)}, neither text nor messages")
    texts = [part for part in responses if isinstance(part, str)]
    if isinstance(prompt, str) and (texts or not responses):
        if len(texts) != len(responses):
            raise RejectedRow("wrong_type", f"{column} mixes text with other values")
        refuse_empty_prompt(prompt)
        return prompt, [*without_text_prompt(prompt, texts)]
    conversations = [as_messages(part, f"{column}[{number}]") for number, part in enumerate(responses)]
    if isinstance(prompt, str):
        messages, conversations = join_text_prompt(prompt, conversations)
        return messages, list(conversations)
    messages = read_messages(row, "prompt")
    return messages, [without_prompt(messages, part) for part in conversations]


# --- Checks --------------------------------------------------------------------------------------------------------


def _check_group(group: PreferenceGroup) -> None:
    """Check what every format must fulfil: text or sound conversations, responses that differ, a preference."""
    check_no_nul(group.prompt, "prompt")
    check_no_nul(group.tools, "tools")
    for number, response in enumerate(group.responses):
        check_no_nul(response, f"response {number}")
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
    check_unicode(group.prompt, "prompt")
    for number, response in enumerate(group.responses):
        assert isinstance(response, str)
        check_unicode(response, f"response {number}")
        if not response.strip():
            raise RejectedRow("empty", f"response {number} has no text")


def _check_conversations(group: PreferenceGroup) -> None:
    assert isinstance(group.prompt, list)
    for number, response in enumerate(group.responses):
        assert isinstance(response, list)
        check_answered(group.prompt + response)
        last = response[-1]
        if not message_text(last).strip() and not last.get("tool_calls"):
            raise RejectedRow("empty", f"response {number} ends with an empty message")
