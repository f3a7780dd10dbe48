"""What a resumed run does: choose a checkpoint, refuse a doubtful one, and load the training state from it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer, set_seed
from transformers.trainer import SCHEDULER_NAME

from rm_scale.config import RunConfig
from rm_scale.distributed import World, agreed_errors
from rm_scale.errors import CheckpointError
from rm_scale.logs import get_logger
from rm_scale.training.attempts import refuse_idle_restart
from rm_scale.training.checkpoint.manifest import check_files, newest_valid, read_manifest
from rm_scale.training.checkpoint.optimizer_state import read_state, require_all_parts, restore_schedule

logger = get_logger(__name__)


def choose_resume(config: RunConfig, world: World, run_folder: Path) -> Path | None:
    """Return the whole checkpoint that this attempt goes on from, `None` for a fresh start. A collective.

    Args:
        config: its `resume_from_checkpoint` says which: a folder, `last` (there must be one) or `auto` (if there is).
        world: this process and the others.
        run_folder: the run's `run/`, with the record of its attempts.

    Raises:
        CheckpointError: on every rank, when what was asked for is not there or is damaged.
        TrainingError: on every rank, when three attempts in a row made no progress.
    """
    asked, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if asked is None:
        return None
    if asked in {"last", "auto"}:
        folder = newest_valid(output_dir, world.rank, world.size)
        if folder is None and asked == "last":
            raise CheckpointError(
                f"resume_from_checkpoint=last: {output_dir} holds no whole checkpoint. Fix: leave the setting out to "
                "start, or --resume_from_checkpoint auto."
            )
    else:
        folder = Path(asked)
        check_files(folder, world.rank, world.size)
    with agreed_errors():
        if world.is_main and asked == "auto" and "idle_restarts" not in config.force:
            refuse_idle_restart(run_folder, read_manifest(folder).step if folder is not None else 0)
    logger.info(f"resuming from {folder}" if folder is not None else "no checkpoint yet: starting from the beginning")
    return folder


def load_training_state(trainer: Trainer, folder: Path) -> None:
    """Put weights, optimizer state, schedule and loss scale of a checkpoint into a trainer. A collective.

    The random state is read by transformers. Only where the checkpoint was written by another number of ranks, and has
    none for this one, it is set here.

    Args:
        trainer: its engine and optimizer have been made.
        folder: a checkpoint with portable optimizer state.

    Raises:
        CheckpointError: on every rank, when the checkpoint is of another model, or a part is missing.
    """
    args, engine = trainer.args, trainer.deepspeed if trainer.is_deepspeed_enabled else None
    with agreed_errors():
        require_all_parts(folder, trainer.model, engine)
    read_state(folder, trainer.model, engine, trainer.optimizer)
    restore_schedule(trainer.lr_scheduler, torch.load(folder / SCHEDULER_NAME, weights_only=True))
    trainer._load_scaler(str(folder))
    rng = folder / ("rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth")
    if not rng.is_file():
        # A seed of its own for each rank, the same in every attempt that resumes here.
        set_seed(args.seed + 1000 * trainer.state.global_step + args.process_index)
        logger.info("another number of ranks than before: dropout draws new numbers, all else goes on exactly")
