"""What an adapter belongs to and brings along: its base model, and the head that was trained beside it.

A run's adapter says so in its contract. That of another project (TRL, ms-swift, LLaMA-Factory) says it in PEFT's own
configuration, and has its head among its tensors or in a file beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rm_scale.errors import ModelError
from rm_scale.modeling.head import HEAD_NAMES
from rm_scale.modeling.head_layouts import is_head_in_adapter, is_lora_on_head, refuse_unreadable_head
from rm_scale.modeling.scoring_contract import CONTRACT_FILE
from rm_scale.modeling.stored_head import head_beside_adapter, read_pickled
from rm_scale.modeling.weight_files import ADAPTER_WEIGHTS_FILE, open_weights, read_header

_CONFIG_FILE = "adapter_config.json"
_PICKLED_FILE = "adapter_model.bin"
_BY_PEFT = "base_model.model."
"""What PEFT writes before the names of a model's tensors."""


@dataclass(frozen=True)
class AdapterBase:
    """The model below an adapter, and the head above it.

    Attributes:
        name: folder or hub name of the base model.
        revision: hub revision.
        head: fp32, `(1, hidden_size)`.
        offset: a constant that is part of every reward.
        needs_code: Python code of the base model's own ran in training.
        quantization: bitsandbytes settings of QLoRA, or `None`.
        dtype: of the base model's weights in training; `None` where that is not known.
        vocab_size: rows of the embedding in training; 0 where that is not known.
        pad_token_id: `None` where that is not known.
    """

    name: str
    revision: str
    head: torch.Tensor
    offset: float = 0.0
    needs_code: bool = False
    quantization: dict[str, Any] | None = None
    dtype: torch.dtype | None = None
    vocab_size: int = 0
    pad_token_id: int | None = None


def adapter_base(folder: Path) -> AdapterBase:
    """Return the base and the head of the adapter in a folder.

    Raises:
        ModelError: the adapter names no base, or has no head of one output.
    """
    if not (folder / CONTRACT_FILE).exists():
        name, revision = base_in_peft_config(folder)
        stored = head_beside_adapter(folder)
        if has_head_among_tensors(folder):
            if stored is not None:
                raise ModelError(
                    f"{folder / ADAPTER_WEIGHTS_FILE}: holds a head ({_heads_in(folder)[0]}), and so does "
                    f"{stored.file.name}; nothing says which gives the reward. Fix: remove the one that does not."
                )
            return AdapterBase(name, revision, *head_among_tensors(folder))
        if stored is None:
            raise ModelError(
                f"{folder}: the adapter holds no reward head, and none lies beside it; it would be random. Fix: give "
                "the folder that holds the trained head."
            )
        return AdapterBase(name, revision, stored.weight(), stored.offset())
    contract = json.loads((folder / CONTRACT_FILE).read_text(encoding="utf-8"))
    base = contract["base_model"]
    return AdapterBase(
        base["name"],
        base["revision"],
        *head_among_tensors(folder),
        needs_code=base["trust_remote_code"],
        quantization=base.get("quantization"),
        dtype=getattr(torch, contract["dtype"]),
        vocab_size=contract["vocab_size"],
        pad_token_id=contract["pad_token_id"],
    )


def base_in_peft_config(folder: Path) -> tuple[str, str]:
    """Return name and revision of the base model that `adapter_config.json` names.

    Raises:
        ModelError: it names none, or a folder that is not there.
    """
    path = folder / _CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"{path}: names no base model. Fix: write base_model_name_or_path, a folder or a hub name, into it."
        )
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ModelError(
            f"{path}: its base model {name!r} is not there. Fix: write the folder where that model is now, or its hub "
            "name, as base_model_name_or_path."
        )
    return name, str(config.get("revision") or "main")


def _heads_in(folder: Path) -> list[str]:
    """Return the names of the heads' weights in an adapter's own file."""
    return sorted(name for name in read_header(folder / ADAPTER_WEIGHTS_FILE) if is_head_in_adapter(name))


def has_head_among_tensors(folder: Path) -> bool:
    """Tell whether an adapter's own file holds a head, as PEFT saves what it trains in full.

    Raises:
        ModelError: it holds a low-rank change of a head alone, or one that is no single linear layer; or the adapter is
            a run's own, and its head has another project's name.
    """
    file = folder / ADAPTER_WEIGHTS_FILE
    names = read_header(file)
    refuse_unreadable_head(str(file), {name.removeprefix(_BY_PEFT): shape for name, shape in names.items()})
    heads = _heads_in(folder)
    _refuse_lora_on_head(file, names)
    other = [name for name in heads if name.split(".")[-2] not in HEAD_NAMES]
    if other and (folder / CONTRACT_FILE).exists():
        raise ModelError(
            f"{file}: its reward head is among its tensors as {other[0]}, which no run of rm_scale calls it, and "
            f"{CONTRACT_FILE} is that of one. Fix: copy the whole folder from the run again; for another project's "
            "adapter, take the contract away."
        )
    return bool(heads)


def _refuse_lora_on_head(file: Path, names: Iterable[str]) -> None:
    on_head = [name for name in names if is_lora_on_head(name)]
    if on_head:
        raise ModelError(
            f"{file}: {on_head[0]} is LoRA on the reward head, whose own weight is not saved with it: a new head "
            "starts at random, so the rewards can't be got back. Fix: train with the head among modules_to_save of the "
            "LoraConfig and not among its target_modules. OpenRLHF's LoRA never saves it: train there without LoRA."
        )


def refuse_pickled_adapter(folder: Path) -> None:
    """Refuse an adapter that lies in adapter_model.bin alone, as OpenRLHF writes it: by what is in it.

    Raises:
        ModelError: always, where there is such a file: it has to be converted, or holds no head, or is no file of
            tensors.
    """
    file = folder / _PICKLED_FILE
    if not file.is_file():
        return
    names = list(read_pickled(file))
    _refuse_lora_on_head(file, names)
    if not any(map(is_head_in_adapter, names)) and head_beside_adapter(folder) is None:
        raise ModelError(
            f"{file}: the adapter in it holds no reward head, and none lies beside it, so scores would be those of a "
            "random one: the head can't be got back. Fix: train with the head saved, e.g. in OpenRLHF without LoRA."
        )
    raise ModelError(
        f"{folder}: holds {_PICKLED_FILE} alone, and such files can run code when they are read. Fix: convert it "
        f"without running code to {ADAPTER_WEIGHTS_FILE}, as docs/foreign_models.md says at its end, and take it away."
    )


def is_read_at_padding(folder: Path) -> bool:
    """Tell whether an adapter's head has the name of transformers' classifiers, which find the last token by padding.

    Raises:
        ModelError: the adapter's file is damaged.
    """
    return any(name.split(".")[-2] in HEAD_NAMES for name in _heads_in(folder))


def head_among_tensors(folder: Path) -> tuple[torch.Tensor, float]:
    """Return the trained head in an adapter's file, fp32, `(1, hidden_size)`, and its bias, 0.0 without one.

    Raises:
        ModelError: the file is damaged, or holds no head.
    """
    file = folder / ADAPTER_WEIGHTS_FILE
    with open_weights(file) as tensors:
        keys = list(tensors.keys())
        names = sorted(key for key in keys if is_head_in_adapter(key))
        if len(names) != 1:
            found = f" ({', '.join(names)})" if names else ""
            raise ModelError(
                f"{file}: holds {len(names)} reward heads{found}, an adapter of a reward model has 1. Fix: give the "
                "output directory of a LoRA or QLoRA run; of another project's, an adapter with one head."
            )
        head: torch.Tensor = tensors.get_tensor(names[0])
        bias = names[0].removesuffix("weight") + "bias"
        stored_bias = tensors.get_tensor(bias) if bias in keys else torch.zeros(1)
    if stored_bias.numel() != 1:
        raise ModelError(
            f"{file}: the bias of its head, {bias}, has the sizes {tuple(stored_bias.shape)}, a reward model's has one "
            "output. Fix: give an adapter that was trained with num_labels=1."
        )
    if head.dim() != 2 or head.shape[0] != 1:
        raise ModelError(
            f"{file}: its head {names[0]} has the sizes {tuple(head.shape)}, a reward model's has one output. Fix: "
            "give an adapter that was trained with num_labels=1."
        )
    return head.float(), float(stored_bias)


def require_width(folder: Path, head: torch.Tensor, width: int, base: str) -> None:
    """Refuse a head that its base model's hidden states do not fit.

    Args:
        folder: of the adapter, for the message.
        head: `(1, hidden_size)`.
        width: of the hidden states.
        base: the base model's name.

    Raises:
        ModelError: it does not fit.
    """
    if head.shape[1] != width:
        raise ModelError(
            f"{folder}: its head has the sizes {tuple(head.shape)}, and its base model {base!r} hidden states of "
            f"{width}. Fix: write the base model that it was trained on into {_CONFIG_FILE}."
        )
