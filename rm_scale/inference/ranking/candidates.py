"""Read the completions of each prompt from the rows of a file, without holding the file in memory.

A row holds all completions of its prompt (`completions` or `responses`), or one of them (`completion` or `response`);
then rows of one prompt follow one another, or a column says which belong together.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from rm_scale.data.context_columns import UnreadContext, refuse_unread_beside
from rm_scale.data.conversations import as_text, as_tools, join_completion, join_text_prompt
from rm_scale.data.formats import without_text_prompt
from rm_scale.data.preference_group import Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError
from rm_scale.inference.scoring.row_files import FIX_IN_FILES, prompt_column

LIST_COLUMNS = ("completions", "responses")
SINGLE_COLUMNS = ("completion", "response")
_NUM_EXAMPLES = 5

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CandidateGroup:
    """The completions of one prompt.

    Attributes:
        prompt: text or messages; "" when there is none.
        completions: K texts or lists of messages; `None` where there is nothing to score.
        problems: K reasons why a completion has no score, `None` where it has or can get one.
        rows: index of the first and the last input row.
        tools: tool descriptions for the chat template.
        columns: further columns of the prompt, carried along.
        per_completion: further columns with one value per completion, K each.
        scores: K scores that the input brought along, `None` when they are to be computed.
    """

    prompt: Text
    completions: tuple[Text | None, ...]
    problems: tuple[str | None, ...]
    rows: tuple[int, int]
    tools: list[Any] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    per_completion: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    scores: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns mean what.

    Attributes:
        group_by: rows with the same value here are one group, wherever they stand; default rows of the same prompt
            that follow one another.
        per_completion: columns with one value per completion.
        score_column: one of them that holds scores; default there are none yet.
        ignore_columns: columns that are carried along and not read, as in training.
    """

    group_by: str | None = None
    per_completion: tuple[str, ...] = ()
    score_column: str | None = None
    ignore_columns: tuple[str, ...] = ()

    def read_of(self, row: Row) -> Row:
        """Return the columns of a row that may be read."""
        return {name: value for name, value in row.items() if name not in self.ignore_columns}


@dataclass
class InputReport:
    """What was met while reading.

    Attributes:
        num_rows: rows read.
        refused: rows that give no completion, by reason of `rm_scale.data.rejected_rows.REJECTION_REASONS`.
        examples: the first rows of each reason, with what was seen.
        differing_columns: columns that change within a prompt without being named as one per completion: not written.
    """

    num_rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    differing_columns: set[str] = field(default_factory=set)

    def refuse(self, index: int, rejected: RejectedRow) -> None:
        """Count one row that can't be used."""
        self.refused[rejected.reason] += 1
        rows = self.examples.setdefault(rejected.reason, [])
        if len(rows) < _NUM_EXAMPLES:
            rows.append((index, rejected.detail))


@dataclass(frozen=True)
class _Part:
    """One completion, from a row of its own or from a list."""

    completion: Text | None
    problem: str | None
    score: float | None
    values: Mapping[str, Any]


@dataclass
class _Open:
    """A group that still grows."""

    key: bytes
    prompt: Text
    tools: list[Any] | None
    first: int
    last: int
    parts: list[_Part]
    columns: dict[str, Any]


def read_groups(rows: Iterable[tuple[int, Any]], columns: Columns, report: InputReport) -> Iterator[CandidateGroup]:
    """Yield the completions of each prompt, in the order in which prompts first occur.

    Args:
        rows: index and content of each row; a `RejectedRow` in place of one that can't be read.
        columns: which columns mean what.
        report: counts rows, and those that can't be used.

    Raises:
        DataError: the rows have no completions; a named column is not there; a prompt comes again after another one; a
            group of `group_by` has several prompts.
    """
    readable = _readable(rows, report)
    first = next(readable, None)
    if first is None:
        return
    _require_columns(first, columns)
    together = chain([first], readable)
    if _first_column(columns.read_of(first[1]), LIST_COLUMNS) is not None:
        yield from _from_lists(together, columns, report)
    else:
        singles = _singles(together, columns, report)
        grouped = _runs if columns.group_by is None else _collected
        yield from grouped(singles, columns, report)


def _readable(rows: Iterable[tuple[int, Any]], report: InputReport) -> Iterator[tuple[int, Row]]:
    for index, row in rows:
        report.num_rows += 1
        if isinstance(row, RejectedRow):
            report.refuse(index, row)
        elif not isinstance(row, Mapping):
            report.refuse(index, RejectedRow("wrong_type", "the row is not an object with columns"))
        else:
            yield index, row


def _first_column(row: Row, names: Sequence[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _require_columns(first: tuple[int, Row], columns: Columns) -> None:
    index, row = first[0], columns.read_of(first[1])
    known = ", ".join(row) or "none"
    if not any(name in row for name in (*LIST_COLUMNS, *SINGLE_COLUMNS)):
        raise DataError(
            f"row {index} has the columns {known}: none of them holds completions. Fix: name it completions (all of a "
            "prompt, a list) or completion (one per row)."
        )
    named = {"--group_by": [columns.group_by] if columns.group_by else [], "--per_completion": columns.per_completion}
    if columns.score_column:
        named["--score_column"] = [columns.score_column]
    for option, names in named.items():
        for name in names:
            if name not in row:
                raise DataError(
                    f"{option} {name}: row {index} has no such column, but {known}. Fix: name one of these."
                )
    if columns.group_by and _first_column(row, LIST_COLUMNS):
        raise DataError(
            f"--group_by {columns.group_by}: row {index} holds all completions of its prompt in a list, so there is "
            "nothing to group. Fix: leave --group_by out."
        )


# --- All completions in one row ------------------------------------------------------------------------------------


def _from_lists(rows: Iterable[tuple[int, Row]], columns: Columns, report: InputReport) -> Iterator[CandidateGroup]:
    for index, row in rows:
        try:
            yield _list_group(index, row, columns)
        except RejectedRow as rejected:
            report.refuse(index, rejected)


def _list_group(index: int, whole: Row, columns: Columns) -> CandidateGroup:
    row = columns.read_of(whole)
    name = _first_column(row, LIST_COLUMNS)
    if name is None:
        raise RejectedRow("missing_key", " or ".join(LIST_COLUMNS))
    completions = row[name]
    if not isinstance(completions, list):
        raise RejectedRow("wrong_type", f"{name} is not a list")
    if not completions:
        raise RejectedRow("empty", f"{name} has no elements")
    prompt, tools = _prompt(row)
    lists = {column: _as_long(row, column, len(completions)) for column in _per_completion(columns)}
    parts = [
        _part(prompt, completion, {column: values[place] for column, values in lists.items()}, columns)
        for place, completion in enumerate(completions)
    ]
    _refuse_unread(row, name, prompt, parts, columns)
    read = {name, "prompt", prompt_column(row), "tools", *lists}
    others = {key: value for key, value in whole.items() if key not in read}
    return _group(prompt, tools, parts, others, (index, index), columns)


def _as_long(row: Row, column: str, length: int) -> list[Any]:
    values = row.get(column)
    if not isinstance(values, list) or len(values) != length:
        seen = f"{len(values)} values" if isinstance(values, list) else "no list"
        raise RejectedRow("bad_label", f"{column} holds {seen} for {length} completions")
    return values


# --- One completion per row ----------------------------------------------------------------------------------------


def _singles(rows: Iterable[tuple[int, Row]], columns: Columns, report: InputReport) -> Iterator[_Open]:
    """Yield each row as a group of one."""
    for index, row in rows:
        try:
            yield _single(index, row, columns)
        except RejectedRow as rejected:
            report.refuse(index, rejected)


def _single(index: int, whole: Row, columns: Columns) -> _Open:
    row = columns.read_of(whole)
    prompt, tools = _prompt(row)
    name = _first_column(row, SINGLE_COLUMNS)
    if name is None and _first_column(row, LIST_COLUMNS) is not None:
        raise RejectedRow("missing_key", "completion: the row holds a list of them, the rows before it one each")
    values = {column: row.get(column) for column in _per_completion(columns)}
    part = _part(prompt, None if name is None else row[name], values, columns)
    _refuse_unread(row, name, prompt, [part], columns)
    read = {*SINGLE_COLUMNS, "prompt", prompt_column(row), "tools", *values}
    others = {key: value for key, value in whole.items() if key not in read}
    if columns.group_by is not None and row.get(columns.group_by) is None:
        raise RejectedRow("missing_key", columns.group_by)
    identity = [prompt, tools] if columns.group_by is None else row[columns.group_by]
    return _Open(_digest(identity), prompt, tools, index, index, [part], others)


def _runs(singles: Iterable[_Open], columns: Columns, report: InputReport) -> Iterator[CandidateGroup]:
    """Yield groups of rows that follow one another. Of earlier ones only 16 bytes and a row number are kept."""
    ended: dict[bytes, int] = {}
    current: _Open | None = None
    for single in singles:
        if current is not None and single.key == current.key:
            _join(current, single, report)
            continue
        if single.key in ended:
            raise DataError(
                f"row {single.first}: its prompt was in row {ended[single.key]} already, with other prompts between. "
                "Rows of one prompt must follow one another. Fix: sort the file by prompt, or --group_by COLUMN, which "
                "collects rows wherever they stand (and holds the file in memory)."
            )
        if current is not None:
            ended[current.key] = current.last
            yield from _closed(current, columns, report)
        current = single
    if current is not None:
        yield from _closed(current, columns, report)


def _collected(singles: Iterable[_Open], columns: Columns, report: InputReport) -> Iterator[CandidateGroup]:
    groups: dict[bytes, _Open] = {}
    for single in singles:
        group = groups.get(single.key)
        if group is None:
            groups[single.key] = single
        elif (group.prompt, group.tools) != (single.prompt, single.tools):
            raise DataError(
                f"--group_by {columns.group_by}: rows {group.first} and {single.first} have the same value there, but "
                "different prompts, and scores of different prompts don't compare. Fix: group by a column that names "
                "the prompt."
            )
        else:
            _join(group, single, report)
    for group in groups.values():
        yield from _closed(group, columns, report)


def _join(group: _Open, single: _Open, report: InputReport) -> None:
    group.last = single.last
    group.parts += single.parts
    for name in {*group.columns, *single.columns}:
        if group.columns.get(name) != single.columns.get(name):
            # It says something about a completion, and the user hasn't said that it does.
            group.columns[name] = None
            report.differing_columns.add(name)


def _closed(group: _Open, columns: Columns, report: InputReport) -> Iterator[CandidateGroup]:
    rows = (group.first, group.last)
    try:
        yield _group(group.prompt, group.tools, group.parts, group.columns, rows, columns)
    except RejectedRow as rejected:
        for _ in group.parts:
            report.refuse(group.first, rejected)


def _digest(identity: Any) -> bytes:
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# --- Values --------------------------------------------------------------------------------------------------------


def _per_completion(columns: Columns) -> tuple[str, ...]:
    names = (*columns.per_completion, *([columns.score_column] if columns.score_column else []))
    return tuple(dict.fromkeys(names))


def _prompt(row: Row) -> tuple[Text, list[Any] | None]:
    name = prompt_column(row)
    if row.get(name) is None:
        raise RejectedRow("missing_key", "prompt")
    prompt = as_text(row[name], name)
    if isinstance(prompt, str) and not prompt.strip():
        raise RejectedRow("empty", "the prompt has no text")
    return prompt, as_tools(row.get("tools"))


def _refuse_unread(row: Row, name: str | None, prompt: Text, parts: Sequence[_Part], columns: Columns) -> None:
    """Refuse a row with completions in two columns that differ, or with context that is not read.

    Raises:
        UnreadContext: names the columns.
    """
    for other in (*LIST_COLUMNS, *SINGLE_COLUMNS):
        value = row.get(other)
        named = other in _per_completion(columns)
        if name is None or other == name or value is None or named or value == row[name]:
            continue
        if not (isinstance(row[name], list) and value in row[name]):
            fix = FIX_IN_FILES.format(names=other)
            raise UnreadContext([other], f"{name} and {other} hold different completions. Fix: {fix}")
    said = [part.completion for part in parts if part.completion is not None]
    group_by = {columns.group_by} if columns.group_by else set()
    read = {prompt_column(row), *LIST_COLUMNS, *SINGLE_COLUMNS, *_per_completion(columns), *group_by}
    refuse_unread_beside(row, prompt, said, read, FIX_IN_FILES)


def _part(prompt: Text, completion: Any, values: Mapping[str, Any], columns: Columns) -> _Part:
    """Return one completion with what belongs to it; what is wrong with it is kept as a reason."""
    score: float | None = None
    text: Text | None = None
    try:
        if completion is None:
            raise RejectedRow("missing_key", "completion")
        text = as_text(completion, "completion")
        if columns.score_column is not None:
            score = number(values[columns.score_column], columns.score_column)
    except RejectedRow as rejected:
        return _Part(text, rejected.reason, None, values)
    return _Part(text, None, score, values)


def _group(
    prompt: Text,
    tools: list[Any] | None,
    parts: Sequence[_Part],
    others: Mapping[str, Any],
    rows: tuple[int, int],
    columns: Columns,
) -> CandidateGroup:
    """Make a group of completions of one kind: messages as soon as the prompt or one of them is.

    Raises:
        RejectedRow: some of the completions repeat the prompt, and others don't.
    """
    chat = not isinstance(prompt, str) or any(isinstance(part.completion, list) for part in parts)
    problems = [part.problem for part in parts]
    completions = [part.completion for part in parts]
    if chat:
        prompt, completions = _as_messages(prompt, completions)
        for place, completion in enumerate(completions):
            if completion is not None:
                try:
                    _, completions[place] = join_completion(prompt, completion)
                except RejectedRow as rejected:
                    problems[place] = problems[place] or rejected.reason
    else:
        assert isinstance(prompt, str)
        rests = iter(without_text_prompt(prompt, [one for one in completions if isinstance(one, str)]))
        completions = [None if one is None else next(rests) for one in completions]
    return CandidateGroup(
        prompt=prompt,
        completions=tuple(completions),
        problems=tuple(problems),
        rows=rows,
        tools=tools,
        columns=others,
        per_completion={
            name: tuple(part.values[name] for part in parts)
            for name in _per_completion(columns)
            if name != columns.score_column
        },
        scores=None if columns.score_column is None else tuple(part.score for part in parts),
    )


def _as_messages(prompt: Text, completions: Sequence[Text | None]) -> tuple[Text, list[Text | None]]:
    """Return prompt and completions as messages; a text prompt may be one that the completions repeat."""
    lists: list[Text | None] = [
        [{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in completions
    ]
    if not isinstance(prompt, str):
        return prompt, lists
    try:
        messages, joined = join_text_prompt(prompt, [one for one in lists if isinstance(one, list)])
    except RejectedRow:
        # What does not follow the prompt as the user's turn is refused by itself.
        return [{"role": "user", "content": prompt}], lists
    rest = iter(joined)
    return messages, [None if one is None else next(rest) for one in lists]


def number(value: Any, column: str) -> float:
    """Return a finite number, also from the text that CSV holds.

    Raises:
        RejectedRow: there is none.
    """
    if value is None or value == "":
        raise RejectedRow("missing_key", column)
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RejectedRow("wrong_type", f"{column} holds {value!r:.40}, not a finite number")
    return found


def number_or_none(value: Any) -> float | None:
    """Return a finite number, or `None` where there is none."""
    try:
        return number(value, "")
    except RejectedRow:
        return None
