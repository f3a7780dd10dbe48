"""What is in a folder that was given as a reward model: refused by name when it is none, before weights are read."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.errors import ModelError
from rm_scale.logs import get_logger
from rm_scale.modeling.contract import CONTRACT_FILE, BaseModel, ScoringContract
from rm_scale.modeling.head import HEAD_NAMES
from rm_scale.modeling.tokenizers import load_tokenizer

logger = get_logger(__name__)

_NO_LIMIT = 1_000_000
"""Above this a tokenizer's model_max_length means that it doesn't know one."""
_LONGEST_UNKNOWN = 4096
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def local_folder(name: str | Path) -> Path:
    """A folder as it is, or a hub name's files on this machine.

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
            f"{name}: there is no such folder, and the hub does not give it ({' '.join(str(error).split())[:200]}). "
            "Fix: give a run's output directory, or a hub name that can be read from here."
        ) from error


def require_reward_model(folder: Path) -> None:
    """Say what a folder is when it is no reward model.

    Raises:
        ModelError: not there, empty, a language model, a classifier with several outputs, an adapter without its head.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder. Fix: give a run's output directory.")
    if (folder / "adapter_config.json").is_file():
        _require_head_in_adapter(folder)
    elif (folder / "config.json").is_file():
        _require_scalar_classifier(folder, _read(folder / "config.json"))
    else:
        what = "is empty" if not any(folder.iterdir()) else "holds no config.json or adapter_config.json"
        raise ModelError(f"{folder}: {what}. Fix: give a run's output directory.")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read ({error}). Fix: save the model again.") from error
    return values if isinstance(values, dict) else {}


def _require_scalar_classifier(folder: Path, config: dict[str, Any]) -> None:
    architecture = str((config.get("architectures") or ["model of unknown kind"])[0])
    if not architecture.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{folder}: is a {architecture}, which has no scalar head: not a reward model. Fix: train one from it, "
            f"deepspeed rm_scale/train.py --model_name_or_path {folder} --dataset_path PAIRS.jsonl"
        )
    # transformers leaves num_labels out of the file where id2label says it, and means 2 where neither does.
    num_labels = config.get("num_labels") or len(config.get("id2label") or {}) or 2
    if num_labels != 1:
        raise ModelError(
            f"{folder}: is a classifier with {num_labels} outputs, a reward model has 1. Fix: give a reward model."
        )


def _require_head_in_adapter(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{folder}: holds adapter_config.json but no {file.name}. Fix: copy the whole folder.")
    with safe_open(str(file), framework="pt") as tensors:
        names = list(tensors.keys())
    if not any(part in HEAD_NAMES for name in names for part in name.split(".")):
        task = _read(folder / "adapter_config.json").get("task_type")
        raise ModelError(
            f"{folder}: the adapter (task_type {task}) holds no reward head, so scores would be those of a random one. "
            "Fix: train it with task_type SEQ_CLS, as rm_scale does; the head can't be got back."
        )


def contract_of_plain_model(folder: Path, trust_remote_code: bool = False, asked: bool = True) -> ScoringContract:
    """What transformers alone would do with a reward model that comes without a contract.

    Plain text ends with EOS, conversations are rendered by the tokenizer's template; nobody promises that training did
    the same.

    Args:
        folder: a reward model.
        trust_remote_code: run code that comes with the tokenizer.
        asked: the user wants that.

    Raises:
        ModelError: not asked for; an adapter, whose base only a contract tells; or the tokenizer can't be used.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: an adapter without {CONTRACT_FILE} can't be scored with. Fix: merge it into its base with peft "
            "(merge_and_unload), save that, and score it with --no_contract (in Python allow_missing_contract=True)."
        )
    if not asked:
        raise ModelError(
            f"{folder}: a reward model without {CONTRACT_FILE}, so it is not known how its texts became tokens in "
            "training. Fix: copy the file from the training run if there is one; or --no_contract (in Python "
            "allow_missing_contract=True) to go by its tokenizer and config alone."
        )
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    config = _read(folder / "config.json")
    limits = [tokenizer.model_max_length, config.get("max_position_embeddings")]
    limit = min((int(value) for value in limits if value and value < _NO_LIMIT), default=_LONGEST_UNKNOWN)
    encoder = TextEncoder(tokenizer, EncodingRules(max_length=limit))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    logger.warning(
        f"{folder} has no {CONTRACT_FILE}: scoring by its tokenizer and config (at most {limit} tokens, plain text "
        f"ends with {tokenizer.eos_token!r}, padding {tokenizer.pad_token!r}). Whether it was trained so is not known."
    )
    return ScoringContract(
        encoding=encoder.describe(),
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=int(config.get("vocab_size") or len(tokenizer)),
        dtype=dtype,
        compute_dtype=dtype,
        base_model=BaseModel(str(folder)),
    )


def require_template(contract: ScoringContract, template: str, force: bool) -> ScoringContract:
    """The contract with this chat template, which must be its own unless forced.

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
    return replace(contract, encoding={**contract.encoding, "chat_template": template, "chat_template_sha256": given})
