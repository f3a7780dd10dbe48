"""Check what `TextEncoder.describe` has written: the settings of a scoring contract that turn texts into tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rm_scale.json_values import TEXT, TRUE_OR_FALSE, Rule, broken_rule, one_of, whole

OVERLONG_POLICIES = ("drop", "truncate_prompt_left", "error")
LARGEST_TOKEN = 10_000_000
"""Far above any vocabulary: an embedding of so many rows is an error that keeps a machine busy."""

_TOKEN = TEXT.or_null()
_TOKEN_ID = whole(0, LARGEST_TOKEN).or_null()
_RULES: dict[str, Rule] = {
    "append_eos": TRUE_OR_FALSE,
    "max_length": whole(1, 1_000_000_000),
    "overlong_policy": one_of(*OVERLONG_POLICIES),
    "chat_template": TEXT.or_null(),
    "add_special_tokens": TRUE_OR_FALSE,
    "tool_use_template": TEXT.or_null(),
    "chat_template_sha256": TEXT.or_null(),
    "tool_use_template_sha256": TEXT.or_null(),
    "bos_token": _TOKEN,
    "bos_token_id": _TOKEN_ID,
    "eos_token": _TOKEN,
    "eos_token_id": _TOKEN_ID,
    "pad_token": _TOKEN,
    "pad_token_id": _TOKEN_ID,
    "tokenizer_class": TEXT,
    "vocab_size": whole(1, LARGEST_TOKEN),
    "tokenizer_sha256": TEXT,
}
SETTINGS = frozenset(_RULES)
"""All that `TextEncoder.describe` returns."""


def unknown_setting(settings: Mapping[str, Any]) -> str | None:
    """Return which setting is none of an encoder's, and that it would not be done; `None` if all are."""
    unknown = sorted(set(settings) - SETTINGS)
    if not unknown:
        return None
    return f"encoding.{unknown[0]}: this rm_scale knows no such field, so what it asks for would not be done"


def wrong_setting(settings: Mapping[str, Any]) -> str | None:
    """Return the first setting of a wrong type or size, as "encoding.max_length=-1: must be ..."; `None` if all fit.

    A missing setting has its default: older versions wrote fewer. An unknown one is not judged.
    """
    return broken_rule(settings, _RULES, "encoding.")
