"""End a training with the weights of its best checkpoint: `load_best_model_at_end`."""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer

from rm_scale.distributed import agreed_errors
from rm_scale.errors import CheckpointError
from rm_scale.logs import get_logger
from rm_scale.training.checkpoint.manifest import check_files
from rm_scale.training.checkpoint.optimizer_state import holds_portable_state, read_state, require_all_parts

logger = get_logger(__name__)


def restore_best(trainer: Trainer) -> int | None:
    """Put the weights of the best checkpoint into a trainer whose training has ended. A collective.

    They come as they were trained, in full precision: from the training state, not from the rounded model beside it.
    Where there is no such checkpoint the last weights stay, with a warning: hours of training must not be lost to it.

    Args:
        trainer: its state says which step had the best evaluation.

    Returns:
        The step whose weights the trainer has now; `None` when they are still the last ones.
    """
    state, args = trainer.state, trainer.args
    step = state.best_global_step
    if not step:
        logger.warning(f"load_best_model_at_end: no evaluation gave a {args.metric_for_best_model}; {_LAST}")
        return None
    if step == state.global_step:
        logger.info(f"load_best_model_at_end: the last step has the best {args.metric_for_best_model}")
        return None
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    engine = trainer.deepspeed if trainer.is_deepspeed_enabled else None
    try:
        check_files(folder, args.process_index, args.world_size)
        with agreed_errors():
            if not holds_portable_state(folder):
                raise CheckpointError(f"{folder}: its training state is in an engine's own form.")
            require_all_parts(folder, trainer.model, engine)
    except CheckpointError as error:  # on every rank
        logger.warning(f"load_best_model_at_end: {error} {_LAST.capitalize()}")
        return None
    read_state(folder, trainer.model, engine, trainer.optimizer)
    logger.info(
        f"load_best_model_at_end: the run ends with the weights of {folder.name}, whose {args.metric_for_best_model} "
        f"was the best: {state.best_metric:g}"
    )
    return int(step)


_LAST = "the run ends with its last weights"
