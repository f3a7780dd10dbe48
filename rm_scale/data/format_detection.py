"""Decide which format a file has, from its columns and first rows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_scale.data.column_maps.misfits import what_would_fit
from rm_scale.data.context_columns import TOKEN_IDS, UnreadContext, advice, holds_context
from rm_scale.data.conversations import json_messages
from rm_scale.data.formats import (
    COMMON_COLUMNS,
    HH_ASSISTANT,
    HH_HUMAN,
    NEEDED_COLUMNS,
    PAIR_COLUMNS,
    RowReader,
    repeats_prompt,
    shared_length,
)
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row
from rm_scale.errors import DataError
from rm_scale.logs import get_logger
from rm_scale.texts import some_names

logger = get_logger(__name__)


_SHAPES = {
    "explicit_prompt": "texts",
    "implicit_prompt": "whole texts",
    "conversational": 'lists of messages, {"role": "user", "content": "..."}',
    "hh_text": "Human/Assistant texts",
    "ranked": "a text, a list of texts, a list of numbers",
    "soft_label": "texts and a number",
}


@dataclass(frozen=True)
class FormatVerdict:
    """Which format a source has, why, and which of its columns will not be read."""

    name: str
    why: str
    ignored_columns: tuple[str, ...] = ()


def choose_format(
    asked: str,
    columns: Sequence[str],
    sample: Sequence[Row],
    source: str,
    subset_column: str,
    ignore_columns: Sequence[str] = (),
    checks_context: bool = True,
) -> FormatVerdict:
    """Decide how a source is read.

    Args:
        asked: `RunConfig.dataset_format`; "auto" decides by the columns and the sample.
        columns: column names seen, in order.
        sample: the first readable rows.
        source: name of the source, for messages.
        subset_column: column that is read as the row's subset.
        ignore_columns: columns that are not to be read.
        checks_context: refuse a source with context in a column that the format does not read.

    Raises:
        DataError: the asked format does not fit the columns, or none does (names the nearest one); or a column that is
            not read holds context.
    """
    all_columns, columns = columns, [column for column in columns if column not in ignore_columns]
    if asked == "auto":
        name, why = _detect(set(columns), sample)
        if name is None:
            raise DataError(_no_format_text(columns, sample, source))
    else:
        name, why = asked, "dataset_format names it"
        if _missing_columns(name, set(columns)):
            raise DataError(_misfit_text(name, columns, sample, source))
    read = {column for choice in NEEDED_COLUMNS[name] for column in choice} | COMMON_COLUMNS | {subset_column}
    if name in {"conversational", "ranked", "soft_label"}:
        read.add("tools")
    if name == "conversational" and "prompt" not in columns:
        read.add("conversations")
    ignored = [column for column in all_columns if column not in read or column in ignore_columns]
    if name in {"implicit_prompt", "hh_text"} and "prompt" in columns:
        ignored.append("prompt")
    if checks_context:
        refuse_unread_context(RowReader(name, subset_column, source, tuple(ignore_columns)), sample, asked)
    return FormatVerdict(name, why, tuple(ignored))


def refuse_unread_context(reader: RowReader, sample: Sequence[Row], asked: str) -> None:
    """Refuse a source before anything is trained on less than its rows hold.

    Args:
        reader: of the source.
        sample: its first rows.
        asked: `RunConfig.dataset_format`.

    Raises:
        DataError: a column that is not read holds context.
    """
    for row in sample:
        try:
            reader.read(row, 0)
        except UnreadContext as unread:
            if asked == "auto" and unread.columns == ("prompt",):
                continue  # most rows hold the prompt inside their whole texts; this one is refused by itself
            names = " and ".join(unread.columns)
            raise DataError(
                f"{reader.source}: {names} would not be part of what is trained on: rows are read as "
                f"{reader.format}, and in one of them {unread.detail}. Fix: {_advice(reader, unread.columns)}."
            ) from None
        except (RejectedRow, RecursionError):
            continue


def _advice(reader: RowReader, columns: Sequence[str]) -> str:
    if reader.column_map is None:
        return advice(columns)
    names = " ".join(columns)
    return (
        f"say in dataset_columns where {names} belongs (prompt: a template or join, system, tools, margin); or "
        f"--ignore_columns {names} to train without"
    )


def warn_about_hard_labels(source: str) -> None:
    """Warn that every soft label of a source is exactly 0 or 1.

    It may be the number of the better response, the very opposite.
    """
    logger.warning(
        f"{source}: every soft label is exactly 0 or 1. It is read as the probability that the FIRST response is "
        "better. If it is the number of the better response, every pair is the wrong way round. Fix: name the "
        "column better_response_id then."
    )


def _detect(columns: set[str], sample: Sequence[Row]) -> tuple[str | None, str]:
    """Return the format (`None` when none fits) and why it is that one."""
    for name in ("soft_label", "ranked"):
        if not _missing_columns(name, columns):
            found = [c for choice in NEEDED_COLUMNS[name] for c in choice if c in columns]
            return name, f"the columns {', '.join(found)} are there"
    if not {"chosen", "rejected"} <= columns:
        return None, ""
    if _most(sample, _has_messages):
        return "conversational", "chosen, rejected or prompt are messages"
    whole = "prompt" not in columns or _most(sample, _holds_prompt_inside)
    if not whole:
        if _most(sample, _repeats_prompt):
            return "explicit_prompt", "prompt, chosen and rejected are text; most rows repeat the prompt, read once"
        return "explicit_prompt", "prompt, chosen and rejected are text"
    if _most(sample, lambda row: _is_hh(row.get("chosen")) and _is_hh(row.get("rejected"))):
        return "hh_text", "chosen and rejected are '\\n\\nHuman: ... \\n\\nAssistant: ...' texts"
    if "prompt" in columns:
        return "implicit_prompt", "most rows hold the prompt inside chosen and rejected, which are whole texts"
    return "implicit_prompt", "chosen and rejected are text and there is no prompt column"


def _most(sample: Sequence[Row], test: Callable[[Row], bool]) -> bool:
    """Tell whether more than half of the rows pass a test.

    A few bad rows thus don't decide. Rows that lack chosen or rejected don't count.
    """
    rows = [row for row in sample if row.get("chosen") is not None and row.get("rejected") is not None]
    return sum(test(row) for row in rows) > 0.5 * len(rows)


def _has_messages(row: Row) -> bool:
    return any(_is_messages(row.get(column)) for column in ("chosen", "prompt", "conversations"))


def _is_messages(value: Any) -> bool:
    if isinstance(value, str):
        try:
            return json_messages(value, "") is not None
        except RejectedRow:
            return True
    return isinstance(value, list | Mapping)


def _is_hh(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(HH_HUMAN) and HH_ASSISTANT in value


def _repeats_prompt(row: Row) -> bool:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str) and prompt.strip()):
        return False
    return repeats_prompt(prompt, chosen) and repeats_prompt(prompt, rejected)


def _holds_prompt_inside(row: Row) -> bool:
    """Tell whether what chosen and rejected share holds the prompt, behind some other text such as "Human: "."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str) and prompt.strip()):
        return False
    return prompt.strip() in chosen[: shared_length(chosen, rejected)] and not _repeats_prompt(row)


def _missing_columns(name: str, columns: set[str]) -> list[str]:
    """Return what a format needs and `columns` lacks, alternatives joined by "or"."""
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
        f"dataset_format={name}: {source} has the columns {some_names(columns) or 'none'}, but {name} needs "
        f"{_needs(name)}; missing: {', '.join(_missing_columns(name, set(columns)))}. "
        f"The nearest format is {nearest}{because}. Fix: --dataset_format {nearest if detected else 'auto'}, "
        "or rename the columns."
    )


def _no_format_text(columns: Sequence[str], sample: Sequence[Row], source: str) -> str:
    token_ids = [name for name in columns if name in TOKEN_IDS]
    if token_ids:
        return (
            f"{source}: {some_names(token_ids)} hold token ids, as TRL's trainer takes them. Here texts are needed: "
            "what is trained on must be what is scored later, by the rules of the scoring contract. Fix: give the rows "
            "as they were before they were tokenised, with prompt, chosen and rejected."
        )
    fitting = what_would_fit(columns, sample)
    if fitting:
        return f"{source}: no known format fits the columns {some_names(columns)}. Fix: {fitting}"
    nearest = _nearest_format(columns)
    missing = _missing_columns(nearest, set(columns))
    hints = []
    for column in (part for choice in missing for part in choice.split(" or ")):
        close = difflib.get_close_matches(column, columns, n=1, cutoff=0.6)
        context = [name for name in columns if column == "prompt" and holds_context(name)]
        for other in close or context:
            hints.append(f"is '{other}' meant to be '{column}'?")
    if nearest == "soft_label":
        hints.append(
            "soft_label is the probability that the first response is better; a column with the number of the better "
            "one, 0 or 1, is better_response_id."
        )
    all_needs = "; ".join(f"{name}: {_needs(name)} ({_SHAPES[name]})" for name in NEEDED_COLUMNS)
    return (
        f"{source}: no known format fits the columns {some_names(columns) or 'none'}. Formats and the columns they "
        f"need: {all_needs}. The nearest format is {nearest}, which misses {', '.join(missing)}. "
        "Fix: rename the columns, or say in dataset_columns where each stands (docs/data_formats.md)"
        f"{' - ' + ' '.join(hints) if hints else ''}."
    )
