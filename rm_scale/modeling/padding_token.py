"""Choose a padding token that differs from EOS, so that the last real token of a text is found."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rm_scale.errors import ModelError
from rm_scale.logs import KEPT, get_logger

logger = get_logger(__name__)

# Tokens that model families reserve and never write themselves; the first one in the vocabulary is taken.
PAD_CANDIDATES = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|endoftext|>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<unk>",
)
ADDED_PAD_TOKEN = "<|rm_scale_pad|>"


def settle_pad_token(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> None:
    """Give the tokenizer a padding token distinct from EOS, adding one only when nothing else is left.

    With pad = EOS the rightmost non-pad token is the one *before* EOS, so the score would be read at the wrong place.

    Raises:
        ModelError: `wanted` is unknown or is the EOS token.
    """
    if wanted is not None:
        require_in_vocabulary(tokenizer, "pad_token", wanted)
        if tokenizer.convert_tokens_to_ids(wanted) == tokenizer.eos_token_id:
            raise ModelError(
                f"pad_token={wanted!r}: is the EOS token, so the score would be read one token too early. "
                "Fix: leave pad_token out, or name another token."
            )
        tokenizer.pad_token = wanted
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    for candidate in PAD_CANDIDATES:
        if candidate in vocabulary and vocabulary[candidate] not in {tokenizer.eos_token_id, tokenizer.bos_token_id}:
            logger.info(
                f"padding token: {candidate} (the tokenizer had {tokenizer.pad_token}, EOS is {tokenizer.eos_token})",
                extra=KEPT,
            )
            tokenizer.pad_token = candidate
            return
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        # It never ends a text, and it needs no new row in the embedding, which an adapter would have to carry.
        logger.info(f"padding token: {tokenizer.bos_token}, the vocabulary has no unused one", extra=KEPT)
        tokenizer.pad_token = tokenizer.bos_token
        return
    tokenizer.add_special_tokens({"pad_token": ADDED_PAD_TOKEN})
    logger.info(f"padding token: added {ADDED_PAD_TOKEN}, since the vocabulary has no unused one", extra=KEPT)


def require_in_vocabulary(tokenizer: PreTrainedTokenizerBase, field: str, token: str) -> None:
    if token not in tokenizer.get_vocab():
        raise ModelError(f"{field}={token!r}: is not in the tokenizer's vocabulary. Fix: name a token that is.")
