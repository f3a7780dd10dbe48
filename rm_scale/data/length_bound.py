"""Tell from its characters alone that a text has too many tokens: to tokenise a megabyte first takes a second of each.

Safe for byte-level BPE tokenizers, as nearly all of today's models have one: every byte of the text lands in a token,
so n tokens hold at most n times the longest one. White space is left out of the count, since added tokens may swallow
any amount of it. Other kinds may drop characters, or make one unknown token of many, and are never judged this way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How ByteLevel writes the bytes of space, tab, line feed and carriage return, each a whole character of the text.
_BYTE_LEVEL_WHITE_SPACE = str.maketrans("", "", "\u0120\u0109\u010a\u010d")
# NFC makes one character of at most four (U+1F82).
_NFC_CHARACTERS = 4


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return how many characters of a text, white space not counted, one token stands for at most.

    Returns:
        `None` where this is not certain for the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None  # code of its own might do anything to a text
    parts = json.loads(backend.to_str())
    factor = _characters_per_character(parts["normalizer"])
    if factor is None or not _keeps_every_byte(parts["model"], parts["pre_tokenizer"]):
        return None
    added = [token["content"] for token in parts["added_tokens"]]
    own = (token.translate(_BYTE_LEVEL_WHITE_SPACE) for token in parts["model"]["vocab"])
    return factor * max(map(len, (*own, *added)))


def num_solid_characters(text: str) -> int:
    """Return how many characters of a text are no white space."""
    return sum(map(len, text.split()))


def _characters_per_character(normalizer: Mapping[str, Any] | None) -> int | None:
    """Return how many characters become one at most; `None`: perhaps they vanish."""
    if normalizer is None:
        return 1
    return _NFC_CHARACTERS if normalizer["type"] == "NFC" else None


def _keeps_every_byte(model: Mapping[str, Any], pre_tokenizer: Mapping[str, Any] | None) -> bool:
    from tokenizers.pre_tokenizers import ByteLevel

    steps = _steps(pre_tokenizer)
    kept = [step for step in steps if step["type"] == "Split" and step["behavior"] != "Removed"]
    kept += [step for step in steps if step["type"] in {"ByteLevel", "Digits"}]
    return (
        model["type"] == "BPE"
        and len(kept) == len(steps)
        and any(step["type"] == "ByteLevel" for step in steps)
        and model["vocab"].keys() >= set(ByteLevel.alphabet())
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    parts: Iterable[Mapping[str, Any]] = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return list(parts)
