"""Check a save: what was written is loaded again and must score the same texts alike."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

from rm_scale.errors import CheckpointError, DiskError
from rm_scale.logs import get_logger
from rm_scale.modeling.golden_scores import allowed_drift, check_golden
from rm_scale.modeling.head import active_head
from rm_scale.modeling.loading import load_reward_model
from rm_scale.modeling.out_of_memory import free_memory, is_out_of_memory
from rm_scale.modeling.packed_model import enable_packed_rows
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.modeling.token_scores import as_in_training, score_sequences
from rm_scale.texts import one_line
from rm_scale.training.checkpoint.publish import ASIDE, is_of_the_disk

logger = get_logger(__name__)

RELOAD_SHARE = 1.3
"""Peak memory while a model is loaded, relative to the memory of the loaded model."""


def with_golden_scores(
    contract: ScoringContract, model: torch.nn.Module, groups: datasets.Dataset, device: torch.device
) -> ScoringContract:
    """Return the contract with a few texts of the data and their scores by the model in training. A collective."""
    sequences = _golden_sequences(groups)
    scores = score_sequences(model, sequences, contract.pad_token_id, batch_size=1, device=device)
    return contract.with_golden(sequences, scores)


def _golden_sequences(groups: datasets.Dataset, count: int = 4) -> list[list[int]]:
    """Return a few short responses of the data: the same on every rank, and cheap to score on a CPU."""
    sample = groups.select(range(min(len(groups), 64)))
    sequences = sorted((ids for row in sample["input_ids"] for ids in row), key=len)
    step = max(1, len(sequences) // 2 // count)
    return [list(ids) for ids in sequences[: step * count : step]]


def parameter_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters, whole where ZeRO-3 holds only a part of them here."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())


def verify_saved(
    folder: Path,
    contract: ScoringContract,
    head_weight: torch.Tensor,
    device: torch.device | str = "cpu",
    model_bytes: int = 0,
    backend: str | None = None,
) -> None:
    """Load a saved model again and compare head and golden scores with the ones in training.

    It is loaded on the training device if its memory allows, so that the same kernels score; else on the CPU, whose
    kernels round differently, and then scores may differ by what `allowed_drift` returns.

    Args:
        folder: what was just written, its scoring contract included.
        contract: holds the golden scores.
        head_weight: fp32 head of the model in training, `(1, hidden_size)`.
        device: where this rank trains.
        model_bytes: memory that the whole model takes, unsharded.
        backend: attention of packed rows in training, which padded rows go through as well. Scored by another one, a
            router in half precision may send a token to other experts.

    Raises:
        CheckpointError: a tensor is empty or not finite, or the head differs.
        ScoresDiffer: head and tensors are right, and the scores differ.
    """
    started = time.perf_counter()
    _check_tensors(folder)
    device = torch.device(device)
    reason = None if device.type == "cpu" else _no_memory(device, model_bytes)
    scores: list[float] | None = None
    if reason is None:
        try:
            scores = _scores_after_reload(folder, contract, head_weight, device, backend)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = "the GPU ran out of memory while it was loaded there"
        if scores is None:
            free_memory()
    allowed = None
    if scores is None:
        scores = _scores_after_reload(folder, contract, head_weight, torch.device("cpu"), None)
        allowed = allowed_drift(contract, contract.compute_dtype)
        logger.info(
            f"checking {_name_to_come(folder).name} on the CPU, where scores may differ by {allowed:.3g}: {reason}"
        )
    golden = contract.golden_scores
    check_golden([g.score for g in golden], scores, contract.compute_dtype, str(folder), allowed)
    logger.info(
        f"saved and verified {_name_to_come(folder)}: {len(golden)} texts score the same after a reload "
        f"({time.perf_counter() - started:.1f} s)"
    )


def _name_to_come(folder: Path) -> Path:
    """Return what a folder that is being saved will be called."""
    step = folder.name.removeprefix(ASIDE).partition("-")[0]
    return folder.with_name(f"checkpoint-{step}") if folder.name.startswith(ASIDE) and step.isdigit() else folder


def _no_memory(device: torch.device, model_bytes: int) -> str | None:
    """Return why a further model doesn't fit on a GPU beside the training, or `None`."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = int(RELOAD_SHARE * model_bytes)
    if needed <= free:
        return None
    return f"the model takes {needed / 1e9:.3g} GB to load and the GPU has {free / 1e9:.3g} GB free"


def _scores_after_reload(
    folder: Path, contract: ScoringContract, head_weight: torch.Tensor, device: torch.device, backend: str | None
) -> list[float]:
    """Return the golden texts' scores by the model as it lies on the disk.

    Raises:
        CheckpointError: its head is not the one in training.
    """
    model = load_reward_model(folder, device=device, trust_remote_code=contract.base_model.trust_remote_code)
    saved_head = active_head(model).effective_weight().detach().cpu()
    if saved_head.shape != head_weight.shape or not torch.equal(saved_head, head_weight.cpu()):
        raise CheckpointError(
            f"{folder}: the saved reward head is not the one in training. The save is not usable. "
            "Fix: keep the previous checkpoint and report this."
        )
    if backend is not None:
        enable_packed_rows(model.get_base_model() if isinstance(model, PeftModel) else model, backend)
    sequences = [golden.input_ids for golden in contract.golden_scores]
    with as_in_training(contract, device.type):
        scores = score_sequences(model, sequences, contract.pad_token_id, batch_size=1, device=device)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()  # it goes back to the training, which had it before
    return scores


@contextlib.contextmanager
def disk_errors_explained(folder: str | Path) -> Iterator[None]:
    """Turn a full or failing disk into one clear error.

    Raises:
        DiskError: writing below `folder` failed.
    """
    try:
        yield
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        raise DiskError(
            f"{folder}: could not be written ({one_line(error, 200)}). What lies there is incomplete. "
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
                f"{file}: can't be read as plain tensors ({one_line(error, 160)}). It is damaged, or "
                "would run code when it is loaded. Fix: resume from another checkpoint."
            ) from error


@contextlib.contextmanager
def only_plain_pickles() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` build numpy's random state and DeepSpeed's few classes beside tensors."""
    with safe_globals(), torch.serialization.safe_globals(_deepspeed_classes()):
        yield


def _deepspeed_classes() -> list[Any]:
    """Return the classes that DeepSpeed's own checkpoints hold beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]


def _check_tensors(folder: Path) -> None:
    """Check that every tensor in the folder has elements, all finite.

    Raises:
        CheckpointError: one has not, or there are no files of weights.
    """
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
