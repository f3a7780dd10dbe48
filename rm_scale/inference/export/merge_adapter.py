"""Merge a trained adapter, LoRA or QLoRA, into its backbone: one plain model that scores the same."""

from __future__ import annotations

from pathlib import Path

from rm_scale.errors import ModelError
from rm_scale.inference.export.export_model import export
from rm_scale.logs import get_logger

logger = get_logger(__name__)


def merge_adapter(folder: str | Path, target: str | Path, trust_remote_code: bool = False) -> Path:
    """Write the merged model, its tokenizer and its contract to `target`, verified.

    The sum is formed in fp32 and stored in the type the backbone was trained in. A QLoRA adapter is merged into the
    unquantised backbone, which moves the scores a little; the drift is logged and the contract's golden scores are
    the merged model's own.

    Args:
        folder: a run's output directory with an adapter.
        target: where the merged model goes; what lies there is replaced.
        trust_remote_code: run Python code that comes with the base model.

    Raises:
        ModelError: there is no adapter.
        CheckpointError: the merged model does not score as backbone and adapter do, both unquantised.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: holds no adapter to merge. Fix: give the output directory of a LoRA or QLoRA run.")
    report = export(folder, target, overwrite=True, trust_remote_code=trust_remote_code)
    logger.info(f"merged model in {target}: largest score difference to training {report.drift:.3g}")
    return report.folder
