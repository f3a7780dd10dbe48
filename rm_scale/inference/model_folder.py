"""Find out what a folder given as a reward model holds, and refuse what is none before weights are read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.errors import ModelError
from rm_scale.json_values import parse_json
from rm_scale.logs import get_logger
from rm_scale.modeling.adapter_base import (
    base_in_peft_config,
    has_head_among_tensors,
    is_read_at_padding,
    refuse_pickled_adapter,
)
from rm_scale.modeling.scoring_contract import CONTRACT_FILE, BaseModel, ScoringContract
from rm_scale.modeling.stored_head import SIDE_FILES, StoredHead, find_stored_head, head_beside_adapter
from rm_scale.modeling.tokenizers import load_tokenizer, read_tokenizer
from rm_scale.modeling.weight_files import ADAPTER_WEIGHTS_FILE
from rm_scale.planning.shape import check_sizes, refuse_endless_files
from rm_scale.texts import one_line

logger = get_logger(__name__)

_NO_LIMIT = 1_000_000
"""Above this a tokenizer's model_max_length means that it doesn't know one."""
_LONGEST_UNKNOWN = 4096
_LIMIT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""What configs call the longest sequence; transformers' own map from a family's names is asked first."""
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*head*.bin", *SIDE_FILES]


def local_folder(name: str | Path) -> Path:
    """Return a folder as it is, or where a hub name's files are on this machine.

    Raises:
        ModelError: there is no such folder, and the hub does not give it either.
    """
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: there is no such folder, and the hub does not give it ({one_line(error, 200)}). "
            "Fix: give a run's output directory, or a hub name that can be read from here."
        ) from error


def require_reward_model(folder: Path) -> None:
    """Refuse a folder that holds no reward model, and say what it holds instead.

    Raises:
        ModelError: not there, empty, a language model, a classifier with several outputs, an adapter without its head.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder. Fix: give a run's output directory.")
    refuse_endless_files(folder)
    if (folder / "adapter_config.json").is_file():
        _require_head_in_adapter(folder)
    elif (folder / "config.json").is_file():
        config = _read(folder / "config.json")
        check_sizes(config, str(folder / "config.json"))
        _require_scalar_classifier(folder, config)
    else:
        what = "is empty" if not any(folder.iterdir()) else "holds no config.json or adapter_config.json"
        raise ModelError(f"{folder}: {what}. Fix: give a run's output directory.")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read ({error}). Fix: save the model again.") from error
    return values if isinstance(values, dict) else {}


def _require_scalar_classifier(folder: Path, config: dict[str, Any]) -> None:
    """Refuse weights without a head of one output. What config.json says counts only where there are no weights.

    Raises:
        ModelError: see `require_reward_model`.
    """
    # transformers leaves num_labels out of the file where id2label says it, and means 2 where neither does.
    num_labels = config.get("num_labels") or len(config.get("id2label") or {}) or 2
    architecture = str((config.get("architectures") or ["model of unknown kind"])[0])
    is_classifier = architecture.endswith("ForSequenceClassification")
    if is_classifier and num_labels != 1 and not any(folder.glob("*.safetensors*")):
        raise ModelError(
            f"{folder}: is a classifier with {num_labels} outputs, a reward model has 1. Fix: give a reward model."
        )
    if find_stored_head(str(folder)) is None:
        raise ModelError(
            f"{folder}: is a {architecture}, which has no scalar head: not a reward model. Fix: train one from it, "
            f"deepspeed rm_scale/train.py --model_name_or_path {folder} --dataset_path PAIRS.jsonl"
        )


def _require_head_in_adapter(folder: Path) -> None:
    file = folder / ADAPTER_WEIGHTS_FILE
    if not file.is_file():
        refuse_pickled_adapter(folder)
        raise ModelError(f"{folder}: holds adapter_config.json but no {file.name}. Fix: copy the whole folder.")
    if has_head_among_tensors(folder):
        return
    # Of a run's own adapter the head is among its tensors: its contract speaks of no other.
    if not (folder / CONTRACT_FILE).exists() and head_beside_adapter(folder) is not None:
        return
    task = _read(folder / "adapter_config.json").get("task_type")
    raise ModelError(
        f"{folder}: the adapter (task_type {task}) holds no reward head, so scores would be those of a random one. "
        f"Fix: if its project saved the head in a file of its own ({SIDE_FILES[0]}), copy it beside the adapter; else "
        "train it with task_type SEQ_CLS, as rm_scale does: the head can't be got back."
    )


def contract_of_plain_model(
    folder: Path, trust_remote_code: bool = False, asked: bool = True, transformers_padding: bool = True
) -> ScoringContract:
    """Return a contract for a reward model that has none: what transformers alone would do with it.

    Plain text ends with EOS, conversations are rendered by the tokenizer's template; nobody promises that training did
    the same.

    Args:
        folder: a reward model.
        trust_remote_code: run code that comes with the tokenizer.
        asked: the user wants that.
        transformers_padding: the score is read at the last token that is not the config's padding, as transformers
            does; else padding is a token that does not end texts, and the last token is read.

    Raises:
        ModelError: not asked for; an adapter whose base is not known; or the tokenizer can't be used.
    """
    if not asked:
        raise ModelError(
            f"{folder}: a reward model without {CONTRACT_FILE}, so it is not known how its texts became tokens in "
            "training. Fix: copy the file from the training run if there is one; or --no_contract (in Python "
            "allow_missing_contract=True) to go by its tokenizer and config alone."
        )
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    is_adapter = (folder / "adapter_config.json").is_file()
    base, revision = base_in_peft_config(folder) if is_adapter else (str(folder), "main")
    config = _model_config(base, revision, trust_remote_code)
    text_config = config.get_text_config()
    limit = _longest_text(tokenizer.model_max_length, text_config)
    encoder = TextEncoder(tokenizer, EncodingRules(max_length=limit))
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    stored = None if is_adapter or not transformers_padding else find_stored_head(str(folder))
    pad = _padding_of_own_code(folder, config, stored, trust_remote_code) if transformers_padding else None
    logger.warning(
        f"{folder} has no {CONTRACT_FILE}: scoring by its tokenizer and config (at most {limit} tokens, plain text "
        f"ends with {tokenizer.eos_token!r}, {_padding_in_words(pad, tokenizer)}). Whether it was trained so is not "
        "known."
    )
    mean, std = _moments(config, stored) or (None, None)
    return ScoringContract(
        encoding=encoder.describe(),
        pad_token_id=tokenizer.pad_token_id if pad is None else pad,
        vocab_size=int(text_config.vocab_size or len(tokenizer)),
        dtype=dtype,
        compute_dtype=dtype,
        base_model=BaseModel(base, revision),
        score_mean=mean,
        score_std=std,
    )


def _moments(config: PreTrainedConfig, stored: StoredHead | None) -> tuple[float, float] | None:
    """Return mean and standard deviation of rewards that its own code can normalise by: in config or weights."""
    mean, std = getattr(config, "mean", None), getattr(config, "std", None)  # as OpenRLHF saves them
    found = (mean, std) if isinstance(mean, float) and isinstance(std, float) else None
    found = found or (None if stored is None else stored.moments())
    if found is not None and (getattr(config, "normalize_reward", False) or getattr(config, "do_normalize", False)):
        logger.warning(
            "its config.json asks for normalised rewards, which its own code gives; here they are raw unless you ask "
            "for normalised ones (--normalized)"
        )
    return found


def _model_config(name: str, revision: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{name}: its config.json can't be used ({one_line(error, 200)}). Fix: it must be that of a model that "
            "this transformers knows; for a model with its own code, --trust_remote_code if you trust it."
        ) from error


def _longest_text(tokenizer_limit: int | None, config: PreTrainedConfig) -> int:
    """Return the most tokens that tokenizer and model allow, by whichever name the model's family says it."""
    limits = [tokenizer_limit, *(getattr(config, name, None) for name in _LIMIT_NAMES)]
    known = [int(value) for value in limits if isinstance(value, int | float) and 0 < value < _NO_LIMIT]
    return min(known, default=_LONGEST_UNKNOWN)


def _padding_of_own_code(
    folder: Path, config: PreTrainedConfig, stored: StoredHead | None, trust_remote_code: bool
) -> int | None:
    """Return the padding token by which its own code finds the last token; `None`: any will do.

    transformers' own classifiers read the score at the last token that is not `config.pad_token_id`, be it EOS. Heads
    that only other trainers' code reads are read at the last token.

    Args:
        folder: the model, or an adapter with a tokenizer.
        config: of the model, or of the adapter's base.
        stored: the model's head, `None` for an adapter.
        trust_remote_code: run code that comes with the tokenizer.
    """
    text_config = config.get_text_config()
    if stored is None:
        # A trainer writes its tokenizer's padding into the config of the base, which is not saved with an adapter.
        saved = read_tokenizer(str(folder), trust_remote_code=trust_remote_code).pad_token_id
        pad = text_config.pad_token_id if saved is None else saved
        is_read_by_padding = is_read_at_padding(folder)
    else:
        pad = text_config.pad_token_id
        # OpenRLHF's classes read the last token of the mask, under transformers' name of the head too.
        is_plain_class = "".join((config.architectures or [""])[:1]).endswith("ForSequenceClassification")
        is_openrlhf = hasattr(config, "normalize_reward") or not is_plain_class
        is_read_by_padding = stored.is_transformers_own() and not is_openrlhf
    is_usable = isinstance(pad, int) and 0 <= pad < text_config.vocab_size
    return pad if is_usable and is_read_by_padding else None


def _padding_in_words(pad: int | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return which token is padding, and what follows where it ends the text too."""
    if pad is None or pad == tokenizer.pad_token_id:
        return f"padding {tokenizer.pad_token!r}"
    token = tokenizer.convert_ids_to_tokens(pad)
    if pad == tokenizer.eos_token_id:
        return f"padding {token!r} is EOS, so that as in transformers the score is read at the token before it"
    return f"padding {token!r}, as its config says"


def require_template(contract: ScoringContract, template: str, force: bool) -> ScoringContract:
    """Return the contract with this chat template, which must be its own unless forced.

    Raises:
        ModelError: it is another one.
    """
    known = contract.encoding.get("chat_template_sha256")
    given = hashlib.sha256(template.encode()).hexdigest()
    if given == known:
        return contract
    seen = f"the chat template (sha256 {given[:12]}) is not the one of training ({(known or 'none')[:12]})"
    if not force:
        raise ModelError(f"{seen}; scores would mean something else. Fix: leave it out, or --force template.")
    logger.warning(f"{seen}: used all the same, as asked; the contract's promises don't hold")
    one = {"chat_template": template, "chat_template_sha256": given}
    none = dict.fromkeys(("tool_use_template", "tool_use_template_sha256"))  # the one is for all conversations
    return replace(contract, encoding={**contract.encoding, **one, **none})
