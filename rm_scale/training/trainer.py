"""The trainer: TRL's `RewardTrainer` with an exact step loss, an exact evaluation, and saves that are verified."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, set_seed
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from rm_scale import __version__
from rm_scale.distributed import agreed_errors, gather_from_ranks, max_over_ranks, sum_over_ranks
from rm_scale.errors import CheckpointError, DiskError, ModelError, TrainingError
from rm_scale.logs import get_logger
from rm_scale.modeling.contract import ScoringContract
from rm_scale.modeling.head import HEAD_NAMES, active_head, check_head_trainable
from rm_scale.modeling.scoring import batch_rewards, score_sequences
from rm_scale.packing.batching import (
    Batching,
    EpochDataLoader,
    GroupRef,
    StepCollator,
    StepDataset,
    StepSampler,
    read_groups,
)
from rm_scale.planning.compute import StepFlops, linear_parameters, peak_flops, step_flops
from rm_scale.planning.shape import shape_from_config
from rm_scale.training.callbacks import not_finite_error
from rm_scale.training.checkpoints import disk_errors_explained, verify_saved
from rm_scale.training.lives import Lives
from rm_scale.training.losses import LossSettings, centering, num_loss_terms, preference_loss
from rm_scale.training.manifest import Manifest
from rm_scale.training.meters import StepMeter
from rm_scale.training.metrics import EvaluationResult, ScoredGroup, evaluate_groups
from rm_scale.training.optimizer_state import (
    holds_portable_state,
    is_portable,
    read_state,
    require_all_parts,
    restore_schedule,
    write_state,
)
from rm_scale.training.saving import aside_name, publish, require_space, rotate, seal, writing
from rm_scale.training.stopping import StopOnRequest
from rm_scale.training.timing import StepTimes
from rm_scale.training.watchdog import Watchdog, is_broken_connection, slow_ranks

logger = get_logger(__name__)


class RewardTrainer(trl.RewardTrainer):
    """Train a scalar reward on preference groups.

    It differs from TRL's trainer in five places only: which groups make a step and its micro-batches
    (`get_train_dataloader`, `training_step`), the loss and its weight (`get_batch_samples`, `compute_loss`), evaluation
    (`evaluate`), saving (`_save`, `save_model`, `_save_checkpoint`), and resuming (`_prepare_for_training`,
    `_run_epoch`). The loop, DeepSpeed, schedules and loggers are transformers'. To its loop a whole optimizer step is
    one batch, since the number of micro-batches may vary.

    Args:
        model: sequence-classification model with a `ScalarHead`, adapters included.
        args: from `training_arguments`.
        tokenizer: saved beside the model.
        train_groups, eval_groups: encoded groups (see `rm_scale.data.preparation`).
        batching: how steps are cut into micro-batches and these become tensors.
        loss_settings: which loss.
        contract: the scoring contract, written at every save.
        shuffle: a new order of the groups in each epoch.
        saved_head: an existing head in fp32, put back exactly when an engine has rounded it.
        callbacks: further callbacks.
        saves: what checkpoints remember, and what happens when one can't be written.
    """

    # The loss is already weighted for the whole step, so it must not be divided by the number of micro-steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: trl.RewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        train_groups: datasets.Dataset,
        eval_groups: datasets.Dataset | None,
        batching: Batching,
        loss_settings: LossSettings,
        contract: ScoringContract,
        shuffle: bool = True,
        saved_head: torch.Tensor | None = None,
        callbacks: list[TrainerCallback] | None = None,
        saves: SaveSettings | None = None,
    ) -> None:
        self.batching = batching
        self.loss_settings = loss_settings
        self.contract = contract
        self.shuffle = shuffle
        self.saved_head = saved_head
        self.saves = saves or SaveSettings()
        self.longest_save_seconds = 0.0
        self._num_skipped = 0
        self._step_rewards: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self._failed_saves = 0
        self._checkpoint_bytes = 0
        self._save_seconds: dict[str, float] = {}
        self.meter = StepMeter()
        self.control: TrainerControl = TrainerControl()
        self._step_terms = 1.0
        self._step_pairs = 1.0
        self._step_rows: list[int] = []
        self._last_evaluation: tuple[int, EvaluationResult] | None = None
        trainable = _trainable_values(model) if getattr(model, "is_loaded_in_4bit", False) else {}
        super().__init__(
            model=model,
            args=args,
            data_collator=batching.collate,
            train_dataset=train_groups,
            eval_dataset=eval_groups,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # TRL rounds the trained weights of quantised models to bfloat16; the engine, if any, does that itself.
        for name, parameter in self.model.named_parameters():
            if name in trainable:
                parameter.data = trainable[name]
        check_head_trainable(self.model)
        self.meter.flops, self.meter.peak_flops = _model_flops(self.model), _device_peak()
        self.add_callback(_SyncHead(self))
        self.step_times = StepTimes(Path(args.output_dir) / "run", not self.is_deepspeed_enabled)
        self.add_callback(self.step_times)
        self.watchdog = self._make_watchdog()
        # Last, so that nothing that transformers decides at a step's end comes after it.
        self.stopping = StopOnRequest(self, self.saves.stop_margin_seconds, self.saves.lives)
        self.add_callback(self.stopping)

    def _make_watchdog(self) -> Watchdog:
        lives = self.saves.lives

        def note_end(reason: str) -> None:
            if lives is not None:
                lives.is_main = True  # whichever rank speaks for all
                lives.note("end", reason=reason)

        return Watchdog(
            Path(self.args.output_dir) / "run",
            self.args.process_index,
            self.args.world_size,
            float(self.args.ddp_timeout),
            self.saves.life,
            lambda: self.meter.is_running,
            note_end,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, watched over."""
        self.watchdog.beat("start")
        if self.args.world_size > 1 and not self.watchdog.is_alive():
            self.watchdog.start()
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if self.args.world_size > 1 and is_broken_connection(error):
                traceback.print_exc()
                self.watchdog.report_and_leave("the connection to another rank broke")
            raise

    def _prepare_dataset(self, dataset: datasets.Dataset, *unused: Any, **also_unused: Any) -> datasets.Dataset:
        """Our groups are encoded and checked already."""
        return dataset

    # --- Batches -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochDataLoader:
        """This rank's share of each step. It is cut here, so accelerate must not shard it again."""
        args = self.args
        sampler = StepSampler(
            num_groups=len(self.train_dataset),
            groups_per_step=self.batching.groups_per_step,
            shuffle=self.shuffle,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )
        return EpochDataLoader(
            StepDataset(self.train_dataset, self.batching.split, args.process_index),
            batch_sampler=sampler,
            collate_fn=StepCollator(self.batching.collate),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """A step with its micro-batches, and the number of loss terms they hold over all ranks."""
        self.meter.resume()
        self.step_times.begin()
        self.watchdog.beat("reading the step's groups", self.state.global_step + 1)
        steps, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_times.data_read()
        batches = [batch for step in steps for batch in step["micro_batches"]]
        terms = sum(num_loss_terms(batch, self.loss_settings) for batch in batches)
        pairs = sum(batch["pair_better"].numel() for batch in batches)
        self._step_terms, self._step_pairs = (max(1.0, total) for total in sum_over_ranks([terms, pairs], device))
        self._step_rows = [int(row) for batch in batches for row in batch["group_index"]]
        self._step_rewards = []
        return steps, torch.tensor(self._step_terms, device=device)

    # --- Loss ----------------------------------------------------------------------------------------------------

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward over a step's micro-batches; the last one reduces gradients and steps the engine."""
        losses = []
        batches = inputs["micro_batches"]
        self._loss_before = self._tr_loss.detach().clone()
        for number, batch in enumerate(batches):
            self.watchdog.beat(f"micro-batch {number + 1} of {len(batches)}")
            is_last = number == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            waits = not is_last and not self.is_deepspeed_enabled
            with self.accelerator.no_sync(model=model) if waits else contextlib.nullcontext():
                losses.append(super().training_step(model, batch, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss.

        Engines average gradients over ranks, so the share is scaled by the number of ranks: what comes out is the mean
        over all terms of the step in the whole world, however it was cut up.
        """
        rewards = batch_rewards(model, inputs)
        loss = preference_loss(rewards, inputs, self.loss_settings) / self._step_terms
        if self.loss_settings.center_coefficient:
            loss = loss + self.loss_settings.center_coefficient * centering(rewards, inputs) / self._step_pairs
        loss = loss * self.args.world_size
        self.meter.add(rewards, inputs)
        self._step_rewards.append((rewards.detach(), inputs))
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Look at loss and gradients before anything is logged or saved from this step.

        Raises:
            TrainingError: on every rank, when a rank's loss or the gradient is not finite more often than
                `max_nonfinite_steps` allows.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With fp16 an infinite norm is how loss scaling finds its scale; the engine skips that step.
        norm_is_bad = norm is not None and not self.args.fp16 and not math.isfinite(float(norm))
        loss_is_bad = not torch.isfinite(self._tr_loss).item()
        bad_losses, bad_norms = sum_over_ranks([float(loss_is_bad), float(norm_is_bad)], self.args.device)
        if bad_losses or bad_norms:
            self._skip_or_stop(int(bad_losses), norm)
        return norm

    def _skip_or_stop(self, bad_losses: int, norm: Any) -> None:
        """Record the step's rows; leave the step out if that is allowed and the weights are still those before it."""
        step = self.state.global_step + 1
        suspects, record = self._record_rows(step, bad_losses, norm)
        # DeepSpeed has stepped by now; it leaves a step out by itself when the gradient norm is not finite.
        untouched = not self.is_deepspeed_enabled or bool(getattr(self.deepspeed.optimizer, "overflow", False))
        untouched = all(gather_from_ranks(untouched))
        if self._num_skipped >= self.saves.max_nonfinite_steps or not untouched:
            raise not_finite_error(bad_losses, norm, step, suspects, self._num_skipped, record)
        self._num_skipped += 1
        for parameter in self.model.parameters():
            parameter.grad = None
        self._tr_loss.copy_(self._loss_before)
        logger.error(
            f"step {step} is left out: the loss is not finite on {bad_losses} ranks (gradient norm {norm}); "
            f"{self._num_skipped} of {self.saves.max_nonfinite_steps} that may be. Rows: {record}"
        )

    def _record_rows(self, step: int, bad_losses: int, norm: Any) -> tuple[list[str], Path]:
        """Write all rows of the step to `run/nonfinite.jsonl`; gives names of groups whose rewards are not finite."""
        bad: set[int] = set()
        for rewards, batch in self._step_rewards:
            groups = batch["row_group"][~rewards.isfinite()]
            index = torch.as_tensor(batch["group_index"])
            bad |= {int(index[place]) for place in groups[groups >= 0].tolist()}
        ranks = gather_from_ranks((self._step_rows, sorted(bad)))
        path = Path(self.args.output_dir) / "run" / "nonfinite.jsonl"
        names = {row: self.train_dataset[row]["id"] or f"row {row}" for rows, _ in ranks for row in rows}
        suspects = [names.get(row, f"row {row}") for _, rows in ranks for row in rows]
        if self.args.process_index == 0:
            rows = [{"rank": rank, "row": row, "id": names[row]} for rank, (of, _) in enumerate(ranks) for row in of]
            entry = {"step": step, "num_ranks": bad_losses, "grad_norm": str(norm), "suspects": suspects, "rows": rows}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return suspects, path

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Useful operations of a step on this rank (see `rm_scale.planning.compute`); transformers adds them up."""
        flops = self.meter.flops
        tokens = [batch["tokens"] for batch in inputs["micro_batches"]]
        return sum(flops.of(count.unshared, count.squares) for count in tokens) if flops is not None else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the meters to a training log line."""
        if "loss" in logs:
            seconds = self.meter.running_seconds()
            logs.update(self.meter.read())
            logs.update(self._name_slow_ranks(seconds))
        self.meter.pause()
        super().log(logs, start_time)

    def _name_slow_ranks(self, seconds: float) -> dict[str, Any]:
        """Compare how long each rank worked, and say by name who keeps the others waiting. A collective."""
        share = self.watchdog.work_share()
        ranks = gather_from_ranks(None if share is None else share * seconds)
        if len(ranks) < 2 or None in ranks:
            return {}
        slow = slow_ranks(ranks)
        for rank, ratio in slow:
            logger.warning(
                f"[slow_rank] rank {rank} worked {ranks[rank]:.2f} s since the last log line, {ratio:.1f} times as "
                "long as the median rank: all others wait for it. Look at its node (clock, other processes, disk)."
            )
        return {"slow_ranks": [rank for rank, _ in slow]} if slow else {}

    # --- Evaluation ----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Exact evaluation over all groups, overall and per subset, logged under `eval_...`."""
        result = self.evaluate_exactly(eval_dataset)
        self._last_evaluation = (self.state.global_step, result)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in _flat(result).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def final_evaluation(self) -> EvaluationResult:
        """The evaluation after the last step, logged; the one just done at that step if there was one."""
        if self._last_evaluation is None or self._last_evaluation[0] != self.state.global_step:
            self.evaluate()
        assert self._last_evaluation is not None
        return self._last_evaluation[1]

    def evaluate_exactly(self, groups: datasets.Dataset | None = None) -> EvaluationResult:
        """Score every response once and count. A collective: every rank must call it and gets the same result."""
        groups = groups if groups is not None else self.eval_dataset
        assert groups is not None, "nothing to evaluate on"
        self.meter.pause()
        scored = self.score_groups(groups)
        return evaluate_groups(scored, self.loss_settings, self.batching.collate.keep_ties)

    def score_groups(self, groups: datasets.Dataset) -> list[ScoredGroup]:
        """All groups with their rewards, in the data set's order, on every rank."""
        world, rank = self.args.world_size, self.args.process_index
        batches = self.batching.scoring_batches(groups)
        model = self.model_wrapped
        model.eval()
        rewards: dict[int, list[float]] = {}
        for start in range(0, len(batches), world):
            # A rank without a batch of its own repeats the first: under ZeRO-3 nobody may skip a forward pass.
            mine = batches[start + rank] if start + rank < len(batches) else batches[start]
            rewards.update(self._score_batch(model, groups, mine))
        everything: dict[int, list[float]] = {}
        for part in gather_from_ranks(rewards):
            everything.update(part)
        rows = groups.select_columns(["ranks", "margin", "soft_label", "subset", "id", "input_ids"])
        return [_scored_group(rows[index], everything[index]) for index in range(len(groups))]

    def _score_batch(
        self, model: torch.nn.Module, groups: datasets.Dataset, indices: list[int]
    ) -> dict[int, list[float]]:
        self.watchdog.beat("evaluation")
        rows = read_groups(groups, [GroupRef(index, True) for index in indices])
        batch = self._prepare_inputs(self.batching.collate(rows))
        with torch.no_grad():
            flat = batch_rewards(model, batch).tolist()
        scores: dict[int, list[float]] = {}
        for index, row in zip(indices, rows, strict=True):
            scores[index], flat = flat[: len(row["ranks"])], flat[len(row["ranks"]) :]
        return scores

    # --- Saving --------------------------------------------------------------------------------------------------

    def sync_head(self) -> None:
        """Give the head the exact fp32 master value that DeepSpeed holds. A collective."""
        if not self.is_deepspeed_enabled or getattr(self, "deepspeed", None) is None:
            return
        from deepspeed.utils import safe_get_full_fp32_param

        head = active_head(self.model)
        if head.weight.dtype == torch.float32:
            return
        master = safe_get_full_fp32_param(head.weight)
        if master is not None:
            head.set_residual(master.reshape(1, -1))

    def restore_saved_head(self) -> None:
        """Give DeepSpeed's fp32 master the exact head that the model came with. A collective."""
        head = active_head(self.model)
        if self.saved_head is None or not self.is_deepspeed_enabled or head.weight.dtype == torch.float32:
            return
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(head.weight, self.saved_head.to(self.args.device))

    def head_weight(self) -> torch.Tensor:
        """The fp32 head `(1, hidden_size)` that rewards are computed with, gathered if ZeRO-3 has sharded it."""
        head = active_head(self.model)
        if hasattr(head.weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([head.weight]):
                return head.effective_weight().detach().cpu().clone()
        return head.effective_weight().detach().cpu().clone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and scoring contract, then load them again and compare. A collective.

        Raises:
            CheckpointError: on every rank, when the reloaded model is not the one in training.
        """
        self.meter.pause()
        self.watchdog.beat("saving the model")
        folder = Path(output_dir or self.args.output_dir)
        sequences = self._golden_sequences()
        scores = score_sequences(
            self.model_wrapped, sequences, self.contract.pad_token_id, batch_size=1, device=self.args.device
        )
        contract = self.contract.with_golden(sequences, scores)
        self._saved_head = self.head_weight()
        # Errors are agreed on after the collectives in here, or the ranks without one would wait for the others.
        with agreed_errors(), disk_errors_explained(folder):
            super().save_model(str(folder), _internal_call=_internal_call)
            if self.args.should_save:
                contract.save(folder)
                verify_saved(folder, contract, self._saved_head)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, seal and publish it. A collective.

        A disk that can't take it does not end a healthy run; `max_failed_saves` in a row do, and one at a stop does.

        Raises:
            CheckpointError: on every rank, when the save differs from the model, or too many have failed.
        """
        started = time.monotonic()
        step = self.state.global_step
        final = Path(self.args.output_dir) / f"checkpoint-{step}"
        # One name for all ranks: it ends in something random.
        aside = final.with_name(gather_from_ranks(aside_name(step, self.saves.life))[0])
        try:
            self._write_checkpoint(aside, final)
        except DiskError as error:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            self._survive_failed_save(error, step)
            return
        self._failed_saves = 0
        seconds = max_over_ranks([int(1000 * (time.monotonic() - started))], self.args.device)[0] / 1000
        self.longest_save_seconds = max(self.longest_save_seconds, seconds)
        if self.saves.lives is not None:
            parts = {name: round(took, 3) for name, took in self._save_seconds.items()}
            self.saves.lives.note(
                "saved", step, seconds=round(seconds, 3), num_bytes=self._checkpoint_bytes, parts=parts
            )
        logger.info(f"checkpoint-{step} is whole: {self._checkpoint_bytes / 1e6:,.1f} MB in {seconds:.1f} s")

    def _write_checkpoint(self, aside: Path, final: Path) -> None:
        rank = self.args.process_index
        with agreed_errors(), writing(aside):
            if rank == 0:
                require_space(final.parent, self._checkpoint_bytes or self._expected_bytes())
                aside.mkdir(parents=True)
        self.store_flos()
        if self.state.best_global_step is not None and (self.state.best_global_step == self.state.global_step):
            self.state.best_model_checkpoint = str(final)
        with self._timed("model"):
            self.save_model(str(aside), _internal_call=True)
        portable, written = False, list[str]()
        resumable = not self.args.save_only_model or bool(self.stopping.reason)
        if resumable:
            with self._timed("state"):
                portable, written = self._write_training_state(aside)
        libraries = ("torch", "transformers", "trl", "peft", "deepspeed", "safetensors")
        versions: dict[str, str | None] = {name: importlib.metadata.version(name) for name in libraries}
        manifest = Manifest(
            step=self.state.global_step,
            world_size=self.args.world_size,
            zero_stage=self.saves.zero_stage,
            resumable=resumable,
            portable=portable,
            life=self.saves.life,
            facts=self.saves.facts,
            versions={"rm_scale": __version__, **versions},
        )
        with self._timed("seal"):
            manifest = seal(aside, manifest, written, rank)
        with agreed_errors():
            if rank == 0:
                publish(aside, final)
                rotate(final.parent, self.args.save_total_limit, self.state.best_global_step)
        self._checkpoint_bytes = gather_from_ranks(manifest.num_bytes)[0]

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Note how long a part of a save took on this rank."""
        started = time.monotonic()
        yield
        self._save_seconds[part] = time.monotonic() - started

    def _write_training_state(self, aside: Path) -> tuple[bool, list[str]]:
        """Optimizer, schedule, random state and transformers' own; gives the files that this rank wrote."""
        engine = self.deepspeed if self.is_deepspeed_enabled else None
        rank, size = self.args.process_index, self.args.world_size
        portable = all(gather_from_ranks(is_portable(self.model, engine, self.optimizer)))
        written: list[str] = []
        if not portable:
            # The engine's own files. Its collectives come in between, so that only an agreed failure is survived.
            self._save_optimizer_and_scheduler(str(aside))
        self.watchdog.beat("writing optimizer state")
        with agreed_errors(), writing(aside):
            if portable:
                written += write_state(aside, self.model, engine, self.optimizer, rank, size)
                if rank == 0:
                    torch.save(self.lr_scheduler.state_dict(), aside / SCHEDULER_NAME)
            self._save_rng_state(str(aside))
            written += [name for name in (f"rng_state_{rank}.pth", "rng_state.pth") if (aside / name).is_file()]
            if rank == 0:
                self._save_scaler(str(aside))
                self._note_callback_states()
                self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
        return portable, written

    def _note_callback_states(self) -> None:
        """What transformers' callbacks want to find again after a resume."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _expected_bytes(self) -> int:
        """Size of the first checkpoint: what is saved in the compute type or fp32, a master and two moments."""
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if p.requires_grad)
        return trained * (4 + (0 if self.args.save_only_model else 12))

    def _survive_failed_save(self, error: DiskError, step: int) -> None:
        self._failed_saves += 1
        limit = self.saves.max_failed_saves
        if self._failed_saves >= limit or self.stopping.reason:
            why = "the run was to stop with it" if self.stopping.reason else f"{self._failed_saves} in a row failed"
            raise CheckpointError(
                f"checkpoint-{step} could not be written, and {why}: {error} Earlier checkpoints are as they were; "
                "then go on with --resume_from_checkpoint last."
            ) from error
        logger.error(
            f"checkpoint-{step} could not be written ({self._failed_saves} of {limit} that may fail in a row); the run "
            f"goes on: {error}"
        )

    # --- Resuming ------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Weights come with the optimizer's state, in full precision."""
        if not holds_portable_state(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Load our own state once the engine stands; the engine's own loader would look for its files."""
        folder = Path(resume_from_checkpoint) if resume_from_checkpoint is not None else None
        ours = folder is not None and holds_portable_state(folder)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if ours else resume_from_checkpoint)
        if ours:
            assert folder is not None
            self._load_training_state(folder)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """No step beyond the last: transformers looks at `max_steps` only after one, and a run may resume there."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_training_state(self, folder: Path) -> None:
        engine = self.deepspeed if self.is_deepspeed_enabled else None
        with agreed_errors():
            require_all_parts(folder, self.model, engine)
        read_state(folder, self.model, engine, self.optimizer)
        restore_schedule(self.lr_scheduler, torch.load(folder / SCHEDULER_NAME, weights_only=True))
        self._load_scaler(str(folder))
        rng = folder / ("rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth")
        if not rng.is_file():
            # Written by another number of ranks: a state of its own for each, the same in every try.
            set_seed(self.args.seed + 1000 * self.state.global_step + self.args.process_index)
            logger.info("another number of ranks than before: dropout draws new numbers, all else goes on exactly")

    def _golden_sequences(self, count: int = 4) -> list[list[int]]:
        """A few short responses of the data: the same on every rank, and cheap to score on a CPU."""
        groups = self.eval_dataset if self.eval_dataset is not None and len(self.eval_dataset) else self.train_dataset
        sample = groups.select(range(min(len(groups), 64)))
        sequences = sorted((ids for row in sample["input_ids"] for ids in row), key=len)
        step = max(1, len(sequences) // 2 // count)
        return [list(ids) for ids in sequences[: step * count : step]]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the weights, with the head in fp32 and without the pickle that transformers adds."""
        if state_dict:
            heads = [name for name in state_dict if name in _head_parameter_names(self.model)]
            assert heads, "the weights to be saved hold no reward head"
            for name in heads:
                state_dict[name] = self._saved_head.clone()
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *unused: Any, **also_unused: Any) -> None:
        """The model card is written once, at the end, with the evaluation's numbers."""


@dataclass(frozen=True)
class SaveSettings:
    """What checkpoints remember of the run, and when a failed one ends it.

    Attributes:
        facts: see `rm_scale.training.run_facts`.
        zero_stage: of this run.
        max_failed_saves: so many in a row end the run.
        max_nonfinite_steps: so many steps with a NaN or infinite loss may be left out.
        stop_margin_seconds: see `rm_scale.training.preemption.margin_seconds`.
        lives: the record of lives, if it is kept.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 0
    max_failed_saves: int = 3
    max_nonfinite_steps: int = 0
    stop_margin_seconds: float | None = None
    lives: Lives | None = None

    @property
    def life(self) -> int:
        """Which life of the run this is."""
        return self.lives.life if self.lives is not None else 1


class _SyncHead(TrainerCallback):
    """Keep the forward pass on the head's fp32 master value under DeepSpeed's low-precision engines."""

    def __init__(self, trainer: RewardTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *unused: Any, **also_unused: Any) -> None:
        """A resumed run has a master from the checkpoint. The head must be sound before the first step.

        Raises:
            TrainingError: on every rank, when it is not.
        """
        if self.trainer.state.global_step == 0:
            self.trainer.restore_saved_head()
        self.trainer.sync_head()
        if not self.trainer.head_weight().isfinite().all():
            raise TrainingError(
                "the reward head holds NaN or infinite weights before the first step. "
                "Fix: check the model's files; for a new head try another --seed."
            )

    def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
        """The master has moved."""
        self.trainer.sync_head()


def _model_flops(model: PreTrainedModel | PeftModel) -> StepFlops | None:
    """What the model's steps cost; `None` for a shape that can't be read."""
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("embed", *HEAD_NAMES)):
            counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    try:
        shape = shape_from_config(model.config.to_dict())
    except ModelError:
        return None
    return step_flops(shape, counts[True], linear_parameters(shape) if counts[False] else 0)


def _device_peak() -> float | None:
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _trainable_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _head_parameter_names(model: torch.nn.Module) -> set[str]:
    head = active_head(model)
    return {name for name, parameter in model.named_parameters() if parameter is head.weight}


def _scored_group(row: dict[str, Any], rewards: list[float]) -> ScoredGroup:
    return ScoredGroup(
        rewards=rewards,
        ranks=row["ranks"],
        margin=row["margin"],
        soft_label=row["soft_label"],
        subset=row["subset"] or "",
        lengths=[len(ids) for ids in row["input_ids"]],
        id=row["id"] or "",
    )


def _flat(result: EvaluationResult) -> dict[str, Any]:
    values = result.as_dict()
    flat = {name: values[name] for name in ("accuracy", "loss", "mean_margin", "num_pairs", "num_ties")}
    low, high = values["accuracy_ci95"]
    flat |= {"accuracy_ci95_low": low, "accuracy_ci95_high": high, "score_std": values["score_std"]}
    return flat | {f"{name}_accuracy": part["accuracy"] for name, part in values["subsets"].items()}
