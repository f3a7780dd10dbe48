"""A checkpoint from beginning to end: model and training state, how long they took, and what a failure leads to."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from rm_scale.distributed import agreed_errors, gather_from_ranks, max_over_ranks
from rm_scale.errors import CheckpointError, DiskError, ScoresDiffer
from rm_scale.logs import get_logger
from rm_scale.training.attempts import Attempt
from rm_scale.training.checkpoint.last_save import give_up, insist
from rm_scale.training.checkpoint.manifest import Manifest
from rm_scale.training.checkpoint.optimizer_state import is_portable, write_state
from rm_scale.training.checkpoint.publish import (
    UNVERIFIED,
    aside_name,
    keep_one_unverified,
    publish,
    require_space,
    rotate,
    seal,
    writing,
)
from rm_scale.training.write_rate import STATE_BYTES, WEIGHT_BYTES
from rm_scale.version import __version__

logger = get_logger(__name__)

T = TypeVar("T")

_LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed", "safetensors")


@dataclass(frozen=True)
class SaveSettings:
    """What checkpoints remember of the run, and when a failure ends it.

    Attributes:
        facts: what decides the run's result (see `rm_scale.training.checkpoint.run_facts`).
        zero_stage: of this run.
        max_failed_saves: the run ends when this many saves in a row have failed.
        max_nonfinite_steps: this many steps with a NaN or infinite loss may be left out.
        stop_margin_seconds: see `rm_scale.training.preemption.margin_seconds`.
        ends_with_best: the run ends with the weights of its best checkpoint.
        attempt: this attempt of the run, if attempts are recorded.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 0
    max_failed_saves: int = 3
    max_nonfinite_steps: int = 0
    stop_margin_seconds: float | None = None
    ends_with_best: bool = False
    attempt: Attempt | None = None

    @property
    def attempt_number(self) -> int:
        """Which attempt of the run this is; the first where attempts are not recorded."""
        return self.attempt.number if self.attempt is not None else 1


class CheckpointWriter:
    """Write the checkpoints of a trainer's run.

    A full disk does not end a healthy run; `max_failed_saves` failures in a row do. A save at a stop is tried again
    while time is left. Nor does the first save end it that scores differently after its reload: it is kept under
    another name.

    Args:
        trainer: whose model and training state are saved, the model by its own `save_model`.
        settings: see there.
        beat: called with the place that is reached, for the watchdog.

    Attributes:
        resumable_step: of the newest checkpoint that this attempt has published and a restart would resume from.
    """

    def __init__(self, trainer: Trainer, settings: SaveSettings, beat: Callable[[str], None]) -> None:
        self.trainer = trainer
        self.settings = settings
        self.beat = beat
        self.resumable_step: int | None = None
        self._num_failed = 0
        self._longest_seconds = 0.0
        self._scores_differed = False
        self._num_bytes = 0  # of the last checkpoint
        self._part_seconds: dict[str, float] = {}  # of the last checkpoint, on this rank

    def save(self, is_stopping: bool) -> float:
        """Write `checkpoint-STEP` under another name, seal and publish it. A collective.

        Args:
            is_stopping: the run stops after this save, and so needs it.

        Returns:
            Seconds it took the slowest rank; 0 when it could not be written and the run goes on.

        Raises:
            CheckpointError: on every rank, when the save differs from the model, or one failure too many.
            LastSaveFailed: on every rank, when it was needed and an earlier checkpoint is there to go on from.
        """
        step = self.trainer.state.global_step
        final = Path(self.trainer.args.output_dir) / f"checkpoint-{step}"

        def write() -> tuple[Path, float]:
            return self._write_aside(final, is_stopping)

        try:
            published, seconds = self._insist(write, final.name) if is_stopping else write()
        except DiskError as error:
            self._survive_failure(error, step, is_stopping)
            return 0.0
        self._num_failed = 0
        if published == final:
            if is_stopping or not self.trainer.args.save_only_model:
                self.resumable_step = step
            self._note_saved(step, seconds)
        elif is_stopping:
            raise CheckpointError(
                f"asked to stop at step {step}, and its checkpoint scores differently after a reload (see above): it "
                f"is kept as {published.name}, which no resume chooses by itself. Fix: compare the scores, then go on "
                f"with --resume_from_checkpoint {published}, or from the last verified one with "
                "--resume_from_checkpoint last."
            )
        logger.info(f"{published.name} is whole: {self._num_bytes / 1e6:,.1f} MB in {seconds:.1f} s")
        return seconds

    def save_last(self, write: Callable[[], None], what: str) -> None:
        """Run the save of a finished training, again while the disk refuses it and time is left. A collective.

        Args:
            write: the save.
            what: its name, for messages.

        Raises:
            DiskError: on every rank, when the disk has refused it to the end.
            LastSaveFailed: the same, where a checkpoint of this attempt is there to go on from.
        """
        try:
            self._insist(write, what)
        except DiskError as error:
            if self.resumable_step is None:
                raise
            raise give_up(what, error, self.trainer.state.global_step, self.resumable_step) from error

    def _insist(self, write: Callable[[], T], what: str) -> T:
        return insist(write, what, self._longest_seconds, self.beat)

    def _write_aside(self, final: Path, is_stopping: bool) -> tuple[Path, float]:
        """Write and publish; return the name that was published, and the seconds that it took the slowest rank.

        Raises:
            DiskError: on every rank; nothing of it is left, as far as the disk allows.
        """
        started = time.monotonic()
        # Rank 0's name for all ranks, since a part of it is random.
        name = aside_name(self.trainer.state.global_step, self.settings.attempt_number)
        aside = final.with_name(gather_from_ranks(name)[0])
        try:
            published = self._write(aside, final, is_stopping)
        except DiskError:
            if self.trainer.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        seconds = max_over_ranks([int(1000 * (time.monotonic() - started))])[0] / 1000
        self._longest_seconds = max(self._longest_seconds, seconds)
        return published, seconds

    def _note_saved(self, step: int, seconds: float) -> None:
        """Record a checkpoint that a restart would resume from."""
        if self.settings.attempt is not None:
            parts = {name: round(took, 3) for name, took in self._part_seconds.items()}
            facts = {"seconds": round(seconds, 3), "num_bytes": self._num_bytes, "parts": parts}
            self.settings.attempt.note("saved", step, **facts)

    def _write(self, aside: Path, final: Path, is_stopping: bool) -> Path:
        """Write all parts to `aside`; return the name under which the checkpoint was then published."""
        trainer, rank = self.trainer, self.trainer.args.process_index
        with agreed_errors(), writing(aside):
            if rank == 0:
                require_space(final.parent, self._num_bytes or self._expected_bytes())
                aside.mkdir(parents=True)
        trainer.store_flos()
        with self._timed("model"):
            named = self._save_model(aside, final)
        if trainer.state.best_global_step == trainer.state.global_step and named == final:
            trainer.state.best_model_checkpoint = str(final)
        portable, written = False, list[str]()
        resumable = not trainer.args.save_only_model or is_stopping
        if resumable:
            with self._timed("state"):
                portable, written = self._write_training_state(aside)
        with self._timed("seal"):
            manifest = seal(aside, self._manifest(resumable, portable), written, rank)
        with agreed_errors():
            if rank == 0:
                publish(aside, named)
                keep_one_unverified(named)
                rotate(final.parent, trainer.args.save_total_limit, trainer.state.best_global_step)
        self._num_bytes = gather_from_ranks(manifest.num_bytes)[0]
        return named

    def _manifest(self, resumable: bool, portable: bool) -> Manifest:
        """Return the manifest without its files."""
        versions: dict[str, str | None] = {name: importlib.metadata.version(name) for name in _LIBRARIES}
        return Manifest(
            step=self.trainer.state.global_step,
            world_size=self.trainer.args.world_size,
            zero_stage=self.settings.zero_stage,
            resumable=resumable,
            portable=portable,
            attempt=self.settings.attempt_number,
            facts=self.settings.facts,
            versions={"rm_scale": __version__, **versions},
        )

    def _save_model(self, aside: Path, final: Path) -> Path:
        """Save the model into the checkpoint; return the checkpoint's name, another one when its scores are in doubt.

        Equally valid kernels may differ by more than was foreseen, and hours of training must not be lost to it. No
        resume chooses a checkpoint of that name by itself, and what it holds is otherwise sound.

        Raises:
            ScoresDiffer: on every rank, when this is not the first time.
        """
        try:
            self.trainer.save_model(str(aside), _internal_call=True)
        except ScoresDiffer as error:
            if self._scores_differed:
                raise
            self._scores_differed = True
            final = final.with_name(f"{UNVERIFIED}{final.name}")
            logger.error(
                f"{error} The first time this does not end the run, since head and tensors are right: the checkpoint "
                f"is kept as {final.name}, and is resumed from only when it is named."
            )
        return final

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Note how long a part of a save took on this rank."""
        started = time.monotonic()
        yield
        self._part_seconds[part] = time.monotonic() - started

    def _write_training_state(self, aside: Path) -> tuple[bool, list[str]]:
        """Write optimizer, schedule, random numbers and transformers' own state. A collective.

        Returns:
            Whether another number of ranks can resume from it, and the files that this rank wrote.
        """
        trainer, args = self.trainer, self.trainer.args
        engine = trainer.deepspeed if trainer.is_deepspeed_enabled else None
        rank = args.process_index
        portable = all(gather_from_ranks(is_portable(trainer.model, engine, trainer.optimizer)))
        written: list[str] = []
        if not portable:
            # The engine's own files. It calls collectives in between, so a rank's failure here can't be survived.
            trainer._save_optimizer_and_scheduler(str(aside))
        self.beat("writing optimizer state")
        with agreed_errors(), writing(aside):
            if portable:
                written += write_state(aside, trainer.model, engine, trainer.optimizer, rank, args.world_size)
                if rank == 0:
                    torch.save(trainer.lr_scheduler.state_dict(), aside / SCHEDULER_NAME)
            trainer._save_rng_state(str(aside))
            written += [name for name in (f"rng_state_{rank}.pth", "rng_state.pth") if (aside / name).is_file()]
            if rank == 0:
                trainer._save_scaler(str(aside))
                self._store_callback_states()
                trainer.state.save_to_json(str(aside / TRAINER_STATE_NAME))
        return portable, written

    def _store_callback_states(self) -> None:
        """Put into the trainer's state what transformers' callbacks want to find again after a resume."""
        for callback in [*self.trainer.callback_handler.callbacks, self.trainer.control]:
            if isinstance(callback, ExportableState):
                self.trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _expected_bytes(self) -> int:
        """Return the first checkpoint's size."""
        parameters = self.trainer.model.parameters()
        trained: int = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
        return trained * (WEIGHT_BYTES + (0 if self.trainer.args.save_only_model else STATE_BYTES))

    def _survive_failure(self, error: DiskError, step: int, is_stopping: bool) -> None:
        """Count a save that the disk refused.

        Raises:
            CheckpointError: on every rank, when it was needed or one too many has failed.
            LastSaveFailed: on every rank, when it was needed, and this attempt has published an earlier one.
        """
        self._num_failed += 1
        if is_stopping and self.resumable_step is not None:
            raise give_up(f"checkpoint-{step}", error, step, self.resumable_step) from error
        limit = self.settings.max_failed_saves
        if self._num_failed >= limit or is_stopping:
            why = "the run was to stop with it" if is_stopping else f"{self._num_failed} in a row failed"
            failed = CheckpointError(
                f"checkpoint-{step} could not be written, and {why}: {error} Earlier checkpoints are as they were; "
                "then go on with --resume_from_checkpoint last."
            )
            failed.met_by = "world"
            raise failed from error
        logger.error(
            f"checkpoint-{step} could not be written ({self._num_failed} of {limit} that may fail in a row); the run "
            f"goes on: {error}"
        )
