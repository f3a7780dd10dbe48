"""The tokenizer of a run: the model's own, with a padding token that differs from EOS."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rm_scale.errors import ModelError
from rm_scale.logs import get_logger

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


def load_tokenizer(
    name: str,
    revision: str = "main",
    trust_remote_code: bool = False,
    eos_token: str | None = None,
    pad_token: str | None = None,
    chat_template_path: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and settle its EOS, padding token and chat template.

    Args:
        name: folder or hub name.
        revision: hub branch, tag or commit.
        trust_remote_code: run code that comes with the tokenizer.
        eos_token: replaces the tokenizer's EOS; must be in the vocabulary.
        pad_token: replaces the choice below; must be in the vocabulary and differ from EOS.
        chat_template_path: Jinja file that replaces the chat template.

    Raises:
        ModelError: no tokenizer there, a token is unknown, or pad and EOS are the same.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model_name_or_path={name!r}: its tokenizer can't be loaded ({_first_line(error)}). "
            "Fix: put the tokenizer's files beside the model."
        ) from error
    if eos_token is not None:
        _require_known(tokenizer, "eos_token", eos_token)
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name!r} has no EOS token. Fix: name one with --eos_token.")
    if chat_template_path is not None:
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    settle_pad_token(tokenizer, pad_token)
    tokenizer.padding_side = "right"
    return tokenizer


def settle_pad_token(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> None:
    """Give the tokenizer a padding token distinct from EOS, adding one only when nothing else is left.

    With pad = EOS the rightmost non-pad token is the one *before* EOS, so the score would be read at the wrong place.

    Raises:
        ModelError: `wanted` is unknown or is the EOS token.
    """
    if wanted is not None:
        _require_known(tokenizer, "pad_token", wanted)
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
                f"padding token: {candidate} (the tokenizer had {tokenizer.pad_token}, EOS is {tokenizer.eos_token})"
            )
            tokenizer.pad_token = candidate
            return
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        # It never ends a text, and it needs no new row in the embedding, which an adapter would have to carry.
        logger.info(f"padding token: {tokenizer.bos_token}, the vocabulary has no unused one")
        tokenizer.pad_token = tokenizer.bos_token
        return
    tokenizer.add_special_tokens({"pad_token": ADDED_PAD_TOKEN})
    logger.info(f"padding token: added {ADDED_PAD_TOKEN}, since the vocabulary has no unused one")


def _require_known(tokenizer: PreTrainedTokenizerBase, field: str, token: str) -> None:
    if token not in tokenizer.get_vocab():
        raise ModelError(f"{field}={token!r}: is not in the tokenizer's vocabulary. Fix: name a token that is.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
