"""Check that a tokenizer can be used for a reward model, and describe what decides its output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rm_scale.errors import ModelError
from rm_scale.logs import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

PROBE_TEXT = "The quick brown fox jumps over 13 lazy dogs."


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, append_eos: bool) -> None:
    """Refuse a tokenizer that would make rewards wrong.

    Args:
        tokenizer: what to check.
        append_eos: plain text gets an EOS token appended, so there must be one.

    Raises:
        ModelError: no EOS although it is to be appended, pad equals EOS, or every text becomes the same token.
    """
    _check_special_tokens(tokenizer, append_eos)
    _check_vocabulary(tokenizer)


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, append_eos: bool) -> None:
    name = type(tokenizer).__name__
    if append_eos and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name} has no EOS token, but plain text must end with one to be scored at its end. "
            "Fix: --eos_token TOKEN, one that is in the vocabulary."
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"{name}: pad_token {tokenizer.pad_token!r} is the EOS token too, so the score would be read one token "
            "before the end. Fix: --pad_token TOKEN, another one than EOS."
        )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer loaded from wrong or missing files: it turns any text into nothing or one unknown token."""
    special = set(tokenizer.all_special_ids)
    if _num_known_tokens(tokenizer, PROBE_TEXT, special) > 1:
        return
    # A toy vocabulary may lack the words of the probe text, but it must know its own words.
    words = [word for word, number in sorted(tokenizer.get_vocab().items()) if number not in special]
    known = _num_known_tokens(tokenizer, " ".join(words[:64]), special)
    if known < min(2, max(len(words), 1)):
        raise ModelError(
            f"{type(tokenizer).__name__} turns any text into {known} known tokens (vocabulary of {len(tokenizer)}): "
            "its vocabulary was not loaded. Fix: check that the folder holds tokenizer.json or the vocabulary files."
        )


def _num_known_tokens(tokenizer: PreTrainedTokenizerBase, text: str, special: set[int]) -> int:
    return len(set(tokenizer(text, add_special_tokens=False)["input_ids"]) - special)


def only_calls_its_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether `tokenizer(texts)` gives the ids that its backend gives, once a call has set the backend up.

    So it is with all that leave calls as transformers has them; what others do besides is not known.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    return (
        issubclass(kind, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and kind._convert_encoding is PreTrainedTokenizerFast._convert_encoding
    )


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return special tokens, class, size and hash of a tokenizer, as JSON values."""
    facts: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        facts[f"{name}_token"] = getattr(tokenizer, f"{name}_token")
        facts[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    facts["tokenizer_class"] = type(tokenizer).__name__
    facts["vocab_size"] = len(tokenizer)
    facts["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    return facts


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of what decides a tokenizer's output.

    Padding and truncation are left out, since calls of the tokenizer switch them on and off.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.update(padding=None, truncation=None)
    else:
        state = {"vocab": tokenizer.get_vocab(), "options": repr(sorted(tokenizer.init_kwargs.items(), key=str))}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def require_same_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> None:
    """Check that a tokenizer is the one that `TextEncoder.describe` was written for; warn when only its files differ.

    Raises:
        ModelError: its special tokens or vocabulary size are others.
    """
    facts = tokenizer_facts(tokenizer)
    checked = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
    wrong = [name for name in checked if name in settings and settings[name] != facts[name]]
    if wrong:
        seen = ", ".join(f"{name}={facts[name]} (settings: {settings[name]})" for name in wrong)
        raise ModelError(
            f"the tokenizer is not the one these settings were written for: {seen}. "
            "Fix: load the tokenizer from the folder that holds the settings."
        )
    if settings.get("tokenizer_sha256", facts["tokenizer_sha256"]) != facts["tokenizer_sha256"]:
        logger.warning("The tokenizer's files differ from those the model was trained with; scores may differ.")
