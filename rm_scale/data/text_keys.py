"""Hashes of what a group says, by which it is recognised whatever its file, its order and the tokenizer."""

from __future__ import annotations

import hashlib
import json
from json.encoder import encode_basestring_ascii
from typing import Any

from rm_scale.data.preference_group import PreferenceGroup


def text_keys(group: PreferenceGroup) -> tuple[int, int]:
    """Return the hash of a group's prompt, and that of prompt and responses."""
    texts = [text for text in (group.prompt, *group.responses) if isinstance(text, str)]
    if group.tools is None and len(texts) == 1 + len(group.responses):
        return _keys_of_texts(*texts)
    group_key = text_hash([group.prompt, list(group.responses), group.tools])
    # Groups without a prompt share none: each counts as a prompt of its own.
    return text_hash([group.prompt, group.tools]) if group.prompt else group_key, group_key


def _keys_of_texts(prompt: str, *responses: str) -> tuple[int, int]:
    """Return the same for plain texts, each written as JSON once: a third of the time."""
    written = encode_basestring_ascii(prompt)
    group_key = _hash(f"[{written}, [{', '.join(map(encode_basestring_ascii, responses))}], null]")
    return _hash(f"[{written}, null]") if prompt else group_key, group_key


def text_hash(value: Any) -> int:
    """Return 64 bits that stand for a JSON value, as a number that int64 holds."""
    return _hash(json.dumps(value, sort_keys=True))


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
