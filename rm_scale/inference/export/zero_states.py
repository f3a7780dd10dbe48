"""Consolidate the weights of a DeepSpeed checkpoint that holds nothing but ZeRO's shards.

transformers' Trainer leaves such folders when weights are not gathered at saves: config and tokenizer, `latest`, and
`global_stepN/` with pickles. DeepSpeed's own reader puts them together, but is kept from running code that a pickle may
hold.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.errors import CheckpointError, DiskError, ModelError
from rm_scale.inference.export.export_card import CARD_FILE
from rm_scale.inference.model_folder import contract_of_plain_model, local_folder
from rm_scale.logs import get_logger
from rm_scale.modeling.scoring_contract import CONTRACT_FILE
from rm_scale.modeling.tokenizers import load_tokenizer
from rm_scale.texts import one_line
from rm_scale.training.checkpoint.reload_check import only_plain_pickles, refuse_unsafe_pickles

logger = get_logger(__name__)

_STEP = re.compile(r"global_step\d+")
_FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class _Shards:
    """Where the shards are.

    Attributes:
        folder: holds config and tokenizer.
        step: name of the folder in it that holds the shards.
    """

    folder: Path
    step: str


@contextmanager
def consolidated(folder: str | Path, target: str | Path) -> Iterator[Path]:
    """Yield the folder as it is, or for the time of the block a plain one made of ZeRO's shards.

    The whole model is held in memory in fp32, twice for a moment.

    Args:
        folder: a model, an adapter, or a checkpoint of ZeRO's shards (or one of its `global_stepN`).
        target: the plain folder is made beside it.

    Raises:
        CheckpointError: shards are missing or damaged, or would run code.
        ModelError: the shards are not those of the model that config.json describes.
        DiskError: there is no space for it.
    """
    folder, target = local_folder(folder), Path(target)
    shards = _find_shards(folder)
    if shards is None:
        yield folder
        return
    plain = target.resolve().parent / f".{target.name}.consolidating-{os.getpid()}"
    try:
        _consolidate(shards, plain)
        yield plain
    finally:
        shutil.rmtree(plain, ignore_errors=True)


def _find_shards(folder: Path) -> _Shards | None:
    """Return ZeRO's shards where the folder holds no other weights; else `None`."""
    if _STEP.fullmatch(folder.name) and any(folder.glob("*_model_states.pt")):
        return _Shards(folder.parent, folder.name)
    latest = folder / "latest"
    if not latest.is_file() or any(folder.glob("*.safetensors")) or (folder / "adapter_config.json").is_file():
        return None
    step = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not _STEP.fullmatch(step) or not (folder / step).is_dir():
        raise CheckpointError(
            f"{latest}: names {step!r}, which is no global_stepN folder of this checkpoint. Fix: give the global_stepN "
            "folder itself, or another checkpoint."
        )
    return _Shards(folder, step)


def _consolidate(shards: _Shards, plain: Path) -> None:
    folder = shards.folder
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: has ZeRO's shards but no config.json. Fix: copy the model's config.json beside them."
        )
    _require_space(shards, plain)
    logger.info(f"{folder / shards.step}: putting ZeRO's shards together")
    model = _load_into(folder, _read(shards))
    tokenizer = load_tokenizer(str(folder))  # with a padding token that is not EOS
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(str(plain))
    tokenizer.save_pretrained(str(plain))
    for name in (CONTRACT_FILE, CARD_FILE):
        if (folder / name).is_file():
            shutil.copy2(folder / name, plain / name)
    if not (plain / CONTRACT_FILE).exists():
        _warn_of_padding(folder, model.config.get_text_config())
        contract_of_plain_model(folder, transformers_padding=False).save(plain)


def _warn_of_padding(folder: Path, config: Any) -> None:
    """Say that scores move where padding was EOS: transformers reads them before it, the export at it."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is not None and config.pad_token_id in ends:
        logger.warning(
            f"{folder}: its padding token is EOS (pad_token_id={config.pad_token_id}), with which transformers reads "
            "the score at the token before EOS; the export pads with another token and reads it at EOS. Fix: if "
            "training padded so, compare both on a few pairs before you rely on the export."
        )


def _require_space(shards: _Shards, plain: Path) -> None:
    states = sum(file.stat().st_size for file in (shards.folder / shards.step).glob("*_optim_states.pt"))
    needed = states / 3  # fp32 weights and Adam's two moments
    free = shutil.disk_usage(plain.parent).free
    if needed > free:
        raise DiskError(
            f"{plain.parent}: putting ZeRO's shards together needs about {needed / 1e9:.1f} GB there for a while, "
            f"{free / 1e9:.1f} GB are free. Fix: free disk space, or an --output on another disk."
        )


def _read(shards: _Shards) -> dict[str, Any]:
    """Read all weights in fp32, by DeepSpeed's reader, held to unpickle only tensors and a few known classes."""
    refuse_unsafe_pickles(shards.folder / shards.step)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    saved = os.environ.get(_FORCE_SAFE)
    os.environ[_FORCE_SAFE] = "1"  # its torch.load says weights_only=False; torch then takes this for the last word
    try:
        with only_plain_pickles():
            states: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(shards.folder), tag=shards.step)
    # What DeepSpeed raises depends on which file is missing or belongs to another checkpoint.
    except (OSError, ValueError, KeyError, AssertionError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{shards.folder / shards.step}: its shards don't make a whole model "
            f"({one_line(error, 200)}). Fix: copy the files of all ranks into it, or give another "
            "checkpoint."
        ) from error
    finally:
        if saved is None:
            del os.environ[_FORCE_SAFE]
        else:
            os.environ[_FORCE_SAFE] = saved
    return states


def _load_into(folder: Path, states: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(str(folder), num_labels=1, trust_remote_code=False)
        # Not in the type of the config: it would round the head.
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder}: its config.json can't be used ({one_line(error, 200)}). Fix: it must be that of "
            "a model that this transformers knows."
        ) from error
    absent, strange = model.load_state_dict(states, strict=False)
    if absent or strange:
        first = (absent or strange)[0]
        raise ModelError(
            f"{folder}: {len(absent)} weights are missing in the shards and {len(strange)} are not the model's (first "
            f"{first}). Fix: config.json must be that of the model that was trained; adapters can't be taken from "
            "shards."
        )
    return model
