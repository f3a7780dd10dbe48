"""Hashes of what a group says, by which it is recognised whatever its file, its order and the tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rm_scale.data.preference_group import PreferenceGroup


def text_keys(group: PreferenceGroup) -> tuple[int, int]:
    """Return the hash of a group's prompt, and that of prompt and responses."""
    group_key = text_hash([group.prompt, list(group.responses), group.tools])
    # Groups without a prompt share none: each counts as a prompt of its own.
    return text_hash([group.prompt, group.tools]) if group.prompt else group_key, group_key


def text_hash(value: Any) -> int:
    """Return 64 bits that stand for a JSON value, as a number that int64 holds."""
    digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
