"""Hashes by which a prompt is recognised in another writing: other case, white space, punctuation, message form."""

from __future__ import annotations

import json

from rm_scale.data.conversations import message_text
from rm_scale.data.formats import HH_ASSISTANT, HH_HUMAN
from rm_scale.data.preference_group import PreferenceGroup, Text
from rm_scale.overlap.normalisation import exact_key, normalised_key


def plain_prompt_key(group: PreferenceGroup, otherwise: int) -> int:
    """Return the hash of what a group's prompt says, normalised.

    Args:
        group: the group.
        otherwise: the key of a group without a prompt, which shares none.
    """
    prompt = said(group.prompt)
    if not prompt:
        return otherwise
    key = normalised_key(prompt)
    return exact_key(json.dumps([key, group.tools], sort_keys=True)) if group.tools else key


def said(text: Text) -> str:
    """Return a text, or what the turns of a conversation say, one below the other.

    Roles and system messages are left out, since the same question is asked with and without them; tool calls are JSON.
    """
    if isinstance(text, str):
        return text.replace(HH_HUMAN, "\n\n").replace(HH_ASSISTANT, "\n\n").strip()
    turns = [message for message in text if message["role"] not in ("system", "developer")]
    parts = []
    for message in turns:
        parts.append(message_text(message))
        if message.get("tool_calls"):
            parts.append(json.dumps(message["tool_calls"], sort_keys=True))
    return "\n\n".join(part for part in parts if part).strip()
