"""Saves that can be trusted: what is written is read back and must score the same."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from rm_scale.errors import CheckpointError, DiskError
from rm_scale.logs import get_logger
from rm_scale.modeling.contract import ScoringContract, check_golden
from rm_scale.modeling.head import active_head
from rm_scale.modeling.loading import load_reward_model
from rm_scale.modeling.scoring import as_in_training, score_sequences

logger = get_logger(__name__)


def verify_saved(folder: Path, contract: ScoringContract, head_weight: torch.Tensor) -> None:
    """Load a saved model on this rank's CPU and compare head and golden scores with the ones in training.

    Args:
        folder: what was just written, its scoring contract included.
        contract: holds the golden scores.
        head_weight: fp32 head of the model in training, `(1, hidden_size)`.

    Raises:
        CheckpointError: a tensor is empty or not finite, the head differs, or the scores do.
    """
    started = time.perf_counter()
    _check_tensors(folder)
    model = load_reward_model(folder, trust_remote_code=contract.base_model.trust_remote_code)
    saved_head = active_head(model).effective_weight().detach().cpu()
    if saved_head.shape != head_weight.shape or not torch.equal(saved_head, head_weight.cpu()):
        raise CheckpointError(
            f"{folder}: the saved reward head is not the one in training. The save is not usable. "
            "Fix: keep the previous checkpoint and report this."
        )
    golden = contract.golden_scores
    with as_in_training(contract, "cpu"):
        scores = score_sequences(
            model, [g.input_ids for g in golden], contract.pad_token_id, batch_size=1, device="cpu"
        )
    check_golden([g.score for g in golden], scores, contract.compute_dtype, str(folder))
    logger.info(
        f"saved and verified {folder}: {len(golden)} texts score the same after a reload "
        f"({time.perf_counter() - started:.1f} s)"
    )


@contextlib.contextmanager
def disk_errors_explained(folder: str | Path) -> Iterator[None]:
    """Turn a full or failing disk into one clear error.

    Raises:
        DiskError: writing below `folder` failed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"{folder}: could not be written ({' '.join(str(error).split())[:200]}). What lies there is incomplete. "
            "Fix: free disk space or choose another output_dir, and resume from the last whole checkpoint."
        ) from error


def refuse_unsafe_pickles(folder: Path) -> None:
    """Look through a checkpoint's pickles before a resume; DeepSpeed itself would run whatever is in its own.

    Raises:
        CheckpointError: `latest` names a strange folder, or a file holds anything but tensors, plain values and
            DeepSpeed's own few classes.
    """
    latest = folder / "latest"
    if latest.is_file() and not re.fullmatch(r"global_step\d+", latest.read_text(encoding="utf-8").strip()):
        raise CheckpointError(
            f"{latest}: names {latest.read_text(encoding='utf-8').strip()!r}, not a global_stepN folder of this "
            "checkpoint. Fix: resume from another checkpoint."
        )
    for file in sorted([*folder.rglob("*.pt"), *folder.rglob("*.pth")]):
        try:
            with only_plain_pickles():
                torch.load(file, map_location="meta", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(
                f"{file}: can't be read as plain tensors ({' '.join(str(error).split())[:160]}). It is damaged, or "
                "would run code when it is loaded. Fix: resume from another checkpoint."
            ) from error


@contextlib.contextmanager
def only_plain_pickles() -> Iterator[None]:
    """`torch.load(weights_only=True)` may build tensors in here, numpy's random state, and DeepSpeed's few classes."""
    with safe_globals(), torch.serialization.safe_globals(_deepspeed_classes()):
        yield


def _deepspeed_classes() -> list[Any]:
    """The classes that DeepSpeed's own checkpoints hold beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]


def _check_tensors(folder: Path) -> None:
    """Every tensor in the folder has values, all finite; an adapter's LoRA weights are matrices."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no weights were written. Fix: check the disk and the rank 0 log.")
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            for name in list(tensors.keys()):
                tensor = tensors.get_tensor(name)
                if math.prod(tensor.shape) == 0 or (tensor.is_floating_point() and not tensor.isfinite().all()):
                    raise CheckpointError(
                        f"{file}: tensor {name} of shape {tuple(tensor.shape)} is empty or not finite. The save is not "
                        "usable. Fix: keep the previous checkpoint and report this."
                    )
