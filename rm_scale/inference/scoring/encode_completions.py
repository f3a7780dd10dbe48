"""Read and encode completions that come from Python or over HTTP, in the form that training has them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rm_scale.data.conversations import read_completion
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
    found: list[Completion | RejectedRow] = []
    for prompt, completion, tool in zip(prompts, completions, tools or [None] * len(prompts), strict=True):
        try:
            found.append(read_completion(prompt, completion, tool))
        except RejectedRow as rejected:
            found.append(rejected)
        except RecursionError:
            found.append(RejectedRow("wrong_type", "the values are nested too deeply"))
    return found


def encode_completions(encoder: TextEncoder, read: Sequence[Completion | RejectedRow]) -> list[list[int] | RejectedRow]:
    """Return the token ids of what was read; for what can't be scored, why not."""
    good = [one for one in read if not isinstance(one, RejectedRow)]
    encoded = iter(encoder.encode_many([p for p, _, _ in good], [c for _, c, _ in good], [t for _, _, t in good]))
    return [one if isinstance(one, RejectedRow) else next(encoded) for one in read]
