"""Tokenise what the texts of a group begin with once, where it is certain that this gives the same tokens.

Byte-pair encoders work on each word by itself, and what a word is says a pattern. In the patterns known here a word
never reaches over a letter that a space follows, whatever stands before and behind, and none of them looks back. So a
text may be cut there: the tokens of both parts, one behind the other, are those of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rm_scale.data.common_prefix import common_prefix_length
from rm_scale.data.tokenizer_checks import only_calls_its_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST = 24
"""Characters that are worth the second call."""

_ENDINGS = r"'s|'t|'re|'ve|'m|'ll|'d"
_PATTERNS = frozenset(
    [
        # GPT-2 and all that follow it, as ByteLevel has it inside.
        rf"{_ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
        # Llama 3 and GPT-4, then Qwen 2 and later: they differ in how they take digits.
        *(
            rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            for digits in (r"\p{N}{1,3}", r"\p{N}")
        ),
    ]
)


def can_be_cut(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether texts may be cut between a letter and the space that follows it, by all that a tokenizer does.

    Its normalisation must not reach over the cut, its pattern must be a known one, its added tokens must not hold a
    space, and it must encode words by themselves, without chance.
    """
    from tokenizers import models

    if not only_calls_its_backend(tokenizer):
        return False
    backend = tokenizer.backend_tokenizer
    model = backend.model
    return (
        isinstance(model, models.BPE)
        and not model.dropout
        and _state(backend.normalizer).get("type") in {None, "NFC"}
        and _has_known_pattern(_state(backend.pre_tokenizer))
        and not any(_reaches_over_space(token) for token in tokenizer.added_tokens_decoder.values())
    )


def _state(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return found


def _has_known_pattern(state: dict[str, Any]) -> bool:
    steps = state["pretokenizers"] if state.get("type") == "Sequence" else [state]
    if not all(_is_known(step) for step in steps):
        return False
    return any(step["type"] == "Split" or (step["type"] == "ByteLevel" and step["use_regex"]) for step in steps)


def _is_known(step: dict[str, Any]) -> bool:
    if step.get("type") == "ByteLevel":
        return not step["add_prefix_space"]
    if step.get("type") == "Split":
        return step["pattern"].get("Regex") in _PATTERNS and step["behavior"] == "Isolated" and not step["invert"]
    return step.get("type") == "Digits"


def _reaches_over_space(token: Any) -> bool:
    content = token.content
    takes_spaces = token.lstrip or token.rstrip
    return any(one.isspace() for one in content) or (takes_spaces and (content[:1].isalpha() or content[-1:].isalpha()))


def place_to_cut(texts: Sequence[str]) -> int | None:
    """Return the last place, in what all texts begin with, where they may be cut; `None` if that is not worth it."""
    place = common_prefix_length(texts) - 1
    first = texts[0]
    while (place := first.rfind(" ", _SHORTEST, max(place, 0))) > 0:
        around = first[place - 1] + first[place + 1]
        if around.isascii() and around.isalpha():
            return place
    return None
