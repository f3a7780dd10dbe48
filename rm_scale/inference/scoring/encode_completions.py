"""Read and encode completions that come from Python or over HTTP, in the form that training has them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rm_scale.data.context_columns import (
    TEMPLATE_ARGUMENTS,
    UnreadContext,
    holds_context,
    refuse_unread_beside,
)
from rm_scale.data.conversations import as_text, read_completion
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.preference_group import Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError

Completion = tuple[Text, Text, list[Any] | None]
"""Prompt, completion and tools."""


def read_completions(
    prompts: Sequence[Any], completions: Sequence[Any], tools: Sequence[Any] | None = None
) -> list[Completion | RejectedRow]:
    """Return each prompt, completion and its tools as `read_completion` does; why not, for those that can't be read.

    Args:
        prompts: texts or lists of messages.
        completions: as many.
        tools: tool descriptions, or their JSON text, one entry per prompt.

    Raises:
        DataError: the lengths differ.
    """
    if len(prompts) != len(completions):
        raise DataError(f"{len(prompts)} prompts and {len(completions)} completions: give one prompt per completion.")
    tools = tools_per_prompt(tools, len(prompts))
    found: list[Completion | RejectedRow] = []
    for prompt, completion, tool in zip(prompts, completions, tools, strict=True):
        try:
            found.append(read_completion(prompt, completion, tool))
        except RejectedRow as rejected:
            found.append(rejected)
        except RecursionError:
            found.append(RejectedRow("wrong_type", "the values are nested too deeply"))
    return found


def tools_per_prompt(tools: Any, num_prompts: int) -> list[Any]:
    """Return the tool descriptions of each prompt as lists, whatever kind of sequence they come in.

    Raises:
        DataError: they are no sequence of one entry per prompt.
    """
    if tools is None:
        return [None] * num_prompts
    if isinstance(tools, str | bytes | Mapping) or not hasattr(tools, "__len__"):
        raise DataError(f"tools is {type(tools).__name__}: must be a list with an entry per prompt. Fix: [tools, ...].")
    if len(tools) != num_prompts:
        raise DataError(
            f"tools has {len(tools)} entries for {num_prompts} prompts: must have one each. Fix: [tools] * "
            f"{num_prompts} where all have the same, None for a prompt without."
        )
    return [_as_list(one) for one in tools]


def refuse_unread_columns(
    prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any], name: str
) -> None:
    """Refuse columns of a trainer's data that hold context outside of the prompts, by the names and rules of training.

    Args:
        prompts: texts or lists of messages.
        completions: as many.
        columns: what the trainer passes beside them; what has not one entry per prompt is no column.
        name: of the reward function, for the message.

    Raises:
        DataError: names the columns, and what one of them holds.
    """
    found = {
        column: values
        for column, values in columns.items()
        if (column == TEMPLATE_ARGUMENTS or holds_context(column)) and _is_column(values, len(prompts))
    }
    for number, (prompt, completion) in enumerate(zip(prompts if found else [], completions, strict=False)):
        row = {column: _as_list(values[number]) for column, values in found.items()}
        try:
            asked = as_text(prompt, "prompt")
            refuse_unread_beside(row, asked, [completion], (), _FIX, any_answer=True)
        except UnreadContext as unread:
            raise DataError(f"reward function {name}, prompt {number}: {unread.detail}") from None
        except (RejectedRow, RecursionError):
            continue  # it gets no reward, for a reason of its own


_FIX = "make it part of the prompt, or reward_function(..., ignore_columns=[...]) with {names} to score without"


def _is_column(values: Any, length: int) -> bool:
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__getitem__"):
        return False
    return hasattr(values, "__len__") and len(values) == length


def _as_list(value: Any) -> Any:
    """Return tuples and arrays as lists; anything else as it is."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value


def encode_completions(encoder: TextEncoder, read: Sequence[Completion | RejectedRow]) -> list[list[int] | RejectedRow]:
    """Return the token ids of what was read; for what can't be scored, why not."""
    good = [one for one in read if not isinstance(one, RejectedRow)]
    encoded = iter(encoder.encode_many([p for p, _, _ in good], [c for _, c, _ in good], [t for _, _, t in good]))
    return [one if isinstance(one, RejectedRow) else next(encoded) for one in read]
