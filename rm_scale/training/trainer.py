"""The trainer: TRL's `RewardTrainer` with an exact step loss, an exact evaluation, and saves that are verified."""

from __future__ import annotations

import contextlib
import functools
import math
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl

from rm_scale.batching.device_transfer import move_batch
from rm_scale.batching.mixture_sampler import sampler_of
from rm_scale.batching.sampler import Batching, EpochDataLoader, StepCollator, StepDataset, StepSampler
from rm_scale.batching.stream_steps import StreamSteps
from rm_scale.data.mixture import Mixture
from rm_scale.distributed import agreed_errors, sum_over_ranks
from rm_scale.logs import get_logger
from rm_scale.modeling.head import check_head_trainable
from rm_scale.modeling.loading import name_exact_type
from rm_scale.modeling.packed_model import packed_backend
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.modeling.token_scores import batch_rewards
from rm_scale.training.agreed_stop import StopOnRequest
from rm_scale.training.callbacks import MetricsFile
from rm_scale.training.checkpoint.best_weights import restore_best
from rm_scale.training.checkpoint.optimizer_state import holds_portable_state
from rm_scale.training.checkpoint.reload_check import (
    disk_errors_explained,
    parameter_bytes,
    verify_saved,
    with_golden_scores,
)
from rm_scale.training.checkpoint.resume import load_training_state
from rm_scale.training.checkpoint.writer import CheckpointWriter, SaveSettings
from rm_scale.training.exact_evaluation import logged_metrics, score_groups
from rm_scale.training.head_sync import HeadSync, head_parameter_names, head_weight
from rm_scale.training.losses import LossSettings, centering, num_loss_terms, preference_loss
from rm_scale.training.meters import StepMeter, device_peak_flops, flops_of_steps
from rm_scale.training.nonfinite_steps import NonFiniteSteps, read_numbers
from rm_scale.training.pair_counts import EvaluationResult, evaluate_groups
from rm_scale.training.records import write_waiting
from rm_scale.training.routing import Routing
from rm_scale.training.slow_ranks import name_slow_ranks
from rm_scale.training.source_meter import SourceMeter
from rm_scale.training.step_timing import StepTimes
from rm_scale.training.watchdog import Watchdog, collective_failure
from rm_scale.training.write_rate import expected_save

logger = get_logger(__name__)


class RewardTrainer(trl.RewardTrainer):
    """Train a scalar reward on preference groups.

    The loop, the engines, schedules and loggers are transformers'. To its loop a whole optimizer step is one batch,
    since the number of micro-batches may vary. Besides `__init__`, these are overridden, of TRL or transformers (a test
    pins each by name and signature: `tests/unit/training/test_overrides.py`):

    Public:
        train: under a watchdog, which names the rank that hangs.
        get_train_dataloader: our sampler cuts steps into micro-batches, and each rank reads its share.
        get_batch_samples: counts the step's loss terms over all ranks.
        training_step: runs the micro-batches of a step, and reduces gradients with the last one.
        compute_loss: a share of the step's exact mean, whatever the micro-batches are.
        floating_point_ops: counts useful operations from our token counts; the base class's guess needs `input_ids`.
        log: adds speed, rewards, the load of experts and slow ranks to a line of training.
        evaluate: counts every pair once; the base class would average over batches.
        save_model: adds the scoring contract, loads the model again and compares its scores.
        create_model_card: does nothing; ours is written at the end, with the evaluation.

    Private, since nothing public is called at these places:
        _prepare_dataset: does nothing; our groups are encoded already.
        _prepare_inputs: moves batches without waiting, and leaves targets in fp32.
        _get_grad_norm: sees loss and gradient before they are logged or saved.
        _save_checkpoint: writes checkpoints by `CheckpointWriter`.
        _save: writes the head in fp32, and no pickle.
        _load_from_checkpoint, _prepare_for_training: load our own, portable training state.
        _run_epoch: makes no step when a run resumes at its last one.

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
        eval_sets: name of the evaluation set of each evaluation group, if there are several.
        mixture: the sources of the training groups and their shares; `None` uses each group once per epoch.
        stream: this rank's share of each step of a streamed run; `train_groups` are then the first ones alone.
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
        eval_sets: Sequence[str] = (),
        mixture: Mixture | None = None,
        stream: StreamSteps | None = None,
    ) -> None:
        self.batching = batching
        self.stream = stream
        self.mixture = mixture
        self.source_meter = SourceMeter(mixture.names if mixture is not None else (), loss_settings)
        self.eval_sets = eval_sets
        self.loss_settings = loss_settings
        self.contract = contract
        self.shuffle = shuffle
        self.meter = StepMeter()
        self.control: TrainerControl = TrainerControl()
        self._step_terms = 1.0
        self._step_pairs = 1.0
        self._last_evaluation: tuple[int, EvaluationResult] | None = None
        self.weights_step: int | None = None  # of the best checkpoint, once its weights have been taken back
        with _trained_weights_kept(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=batching.collate,
                train_dataset=train_groups,
                eval_dataset=eval_groups,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        check_head_trainable(self.model)
        self.routing = Routing(self.model, loss_settings.router_coefficient)
        self.meter.flops, self.meter.peak_flops = flops_of_steps(self.model), device_peak_flops()
        self._add_parts(saves or SaveSettings(), Path(args.output_dir) / "run", saved_head)

    def _add_parts(self, saves: SaveSettings, folder: Path, saved_head: torch.Tensor | None) -> None:
        """Make the parts that this class calls, and those that transformers calls back."""
        attempt, is_main = saves.attempt, self.args.process_index == 0
        self._has_logged = False
        self.watchdog = Watchdog(
            folder,
            self.args.process_index,
            self.args.world_size,
            float(self.args.ddp_timeout),
            saves.attempt_number,
            lambda: self.meter.is_running,
            attempt.end_for_all if attempt is not None else lambda reason: None,
        )
        named = self.stream.stream if self.stream is not None else self.train_dataset
        self.nonfinite = NonFiniteSteps(named, folder / "nonfinite.jsonl", saves.max_nonfinite_steps, is_main)
        self.checkpoints = CheckpointWriter(self, saves, self.watchdog.beat)
        self.head_sync = HeadSync(self, saved_head)
        self.add_callback(self.head_sync)
        self.step_times = StepTimes(folder, not self.is_deepspeed_enabled)
        self.add_callback(self.step_times)
        # Last, so that nothing that transformers decides at a step's end comes after it.
        measure = functools.partial(expected_save, self.model, Path(self.args.output_dir))
        self.stopping = StopOnRequest(self.args, saves.stop_margin_seconds, attempt, measure)
        self.add_callback(self.stopping)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as the base class does, while a watchdog looks for ranks that hang.

        When a collective fails because another rank is gone, the process ends here, after a report; nothing is raised.
        """
        self.watchdog.beat("start")
        if self.args.world_size > 1 and not self.watchdog.is_alive():
            self.watchdog.start()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except RuntimeError as error:
            what = collective_failure(error) if self.args.world_size > 1 else None
            if what is not None:
                traceback.print_exc()
                self.watchdog.report_and_leave(what)
            raise

    def _prepare_dataset(self, dataset: datasets.Dataset, *unused: Any, **also_unused: Any) -> datasets.Dataset:
        """Return the groups as they are: they have been encoded and checked."""
        return dataset

    # --- Batches -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochDataLoader:
        """Return a loader of this rank's share of each step. It is cut here: accelerate must not shard it again."""
        args, mixture = self.args, self.mixture
        if self.stream is not None:
            return self._streaming_loader(self.stream)
        sampler = sampler_of(
            mixture,
            num_groups=len(self.train_dataset),
            groups_per_step=self.batching.groups_per_step,
            shuffle=self.shuffle,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )
        sources, names = (mixture.source, mixture.names) if mixture is not None else (None, ())
        return EpochDataLoader(
            StepDataset(self.train_dataset, self.batching.split, args.process_index),
            batch_sampler=sampler,
            collate_fn=StepCollator(self.batching.collate, sources, len(names)),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
        )

    def _streaming_loader(self, stream: StreamSteps) -> EpochDataLoader:
        """Return a loader that asks the stream for one step after the other: the run is one epoch of it."""
        num_sources = len(self.mixture.names) if self.mixture is not None else 0
        return EpochDataLoader(
            stream,
            batch_sampler=StepSampler(len(stream), self.batching.groups_per_step, shuffle=False, seed=0),
            collate_fn=StepCollator(self.batching.collate, num_sources=num_sources),
            pin_memory=self.args.dataloader_pin_memory and not self.args.use_cpu,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return a step with its micro-batches, and the number of loss terms they hold over all ranks."""
        self.meter.resume()
        self.step_times.begin()
        self.watchdog.beat("reading the step's groups", self.state.global_step + 1)
        steps, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_times.data_read()
        batches = [batch for step in steps for batch in step["micro_batches"]]
        terms = sum(num_loss_terms(batch, self.loss_settings) for batch in batches)
        pairs = sum(batch["pair_better"].numel() for batch in batches)
        self._step_terms, self._step_pairs = (max(1.0, total) for total in sum_over_ranks([terms, pairs]))
        self.nonfinite.begin_step(batches)
        return steps, int(self._step_terms)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a micro-batch to the device; the base class would round targets and margins, and wait for each copy."""
        return move_batch(inputs, self.args.device)

    # --- Loss ----------------------------------------------------------------------------------------------------

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Run a step's micro-batches forward and backward; return the step's loss on this rank.

        The last micro-batch reduces gradients and steps the engine.
        """
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
        """Return this micro-batch's share of the step's loss.

        Engines average gradients over ranks, so the share is scaled by the number of ranks: what comes out is the mean
        over all terms of the step in the whole world, however it was cut up.
        """
        with self.routing.watching(inputs):
            rewards = batch_rewards(model, inputs)
        loss = preference_loss(rewards, inputs, self.loss_settings) / self._step_terms
        if self.loss_settings.center_coefficient:
            loss = loss + self.loss_settings.center_coefficient * centering(rewards, inputs) / self._step_pairs
        loss = loss + self.routing.loss(inputs["pair_better"].numel(), self._step_pairs)
        loss = loss * self.args.world_size
        self.meter.add(rewards, inputs)
        self.source_meter.add(rewards, inputs)
        self.nonfinite.add(rewards, inputs)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Look at loss and gradients before anything is logged or saved from this step.

        Raises:
            TrainingError: on every rank, when a rank's loss or the gradient is not finite more often than
                `max_nonfinite_steps` allows.
        """
        if not isinstance(grad_norm, torch.Tensor):
            grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm, loss = read_numbers(grad_norm, self._tr_loss)
        # With fp16 an infinite norm is how loss scaling finds its scale; the engine skips that step.
        norm_is_bad = norm is not None and not self.args.fp16 and not math.isfinite(norm)
        bad_losses, bad_norms = sum_over_ranks([float(not math.isfinite(loss)), float(norm_is_bad)])
        if bad_losses or bad_norms:
            # DeepSpeed has stepped by now; it leaves a step out by itself when the gradient norm is not finite.
            untouched = not self.is_deepspeed_enabled or bool(getattr(self.deepspeed.optimizer, "overflow", False))
            self.nonfinite.skip_or_stop(self.state.global_step + 1, int(bad_losses), norm, untouched)
            for parameter in self.model.parameters():
                parameter.grad = None
            self._tr_loss.copy_(self._loss_before)
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Return a step's useful operations on this rank (see `rm_scale.planning.flops`); the base adds them up."""
        flops = self.meter.flops
        tokens = [batch["tokens"] for batch in inputs["micro_batches"]]
        return sum(flops.of(count.unshared, count.squares) for count in tokens) if flops is not None else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add to a line of training what the meters have counted. A collective."""
        if "loss" in logs:
            seconds = self.meter.running_seconds()
            figures = {**self.meter.read(), **self.routing.read(), **self.source_meter.read()}
            slow = name_slow_ranks(self.watchdog, seconds, is_first=not self._has_logged)
            self._has_logged = True
            logs.update(self._scalars({**figures, **slow}))
        self.meter.pause()
        super().log(logs, start_time)

    def _scalars(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Return what every logger takes of these figures; hand tables and lists to the metrics file alone."""
        tables = {name: value for name, value in figures.items() if isinstance(value, dict | list)}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, MetricsFile):
                callback.details = tables
        return {name: value for name, value in figures.items() if name not in tables}

    # --- Evaluation ----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate exactly over all groups, overall and per subset; log and return it under `eval_...`."""
        groups = eval_dataset if eval_dataset is not None else self.eval_dataset
        assert groups is not None, "nothing to evaluate on"
        metrics = logged_metrics(self._count_pairs(groups), metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _count_pairs(self, groups: datasets.Dataset) -> EvaluationResult:
        """Score groups with the weights as they are, and remember the result as this step's. A collective."""
        self.meter.pause()
        sets = self.eval_sets if groups is self.eval_dataset else ()
        scored = score_groups(self.model_wrapped, groups, self.batching, self.args, self.watchdog.beat, sets)
        result = evaluate_groups(scored, self.loss_settings, self.batching.collate.keep_ties)
        self._last_evaluation = (self.state.global_step, result)
        return result

    def end_with_best(self) -> None:
        """Take back the weights of the best checkpoint, and evaluate them for the run's records. A collective.

        That evaluation is not logged: its step has a line of it already.
        """
        self.watchdog.beat("reading the best checkpoint")
        self.weights_step = restore_best(self)
        if self.weights_step is not None:
            self.head_sync.sync()
            self._count_pairs(self.eval_dataset)

    def final_evaluation(self) -> EvaluationResult:
        """Return the evaluation after the last step: the one just done at that step, or a new one, logged."""
        if self._last_evaluation is None or self._last_evaluation[0] != self.state.global_step:
            self.evaluate()
        assert self._last_evaluation is not None
        return self._last_evaluation[1]

    # --- Saving --------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and scoring contract, then load them again and compare. A collective.

        Raises:
            CheckpointError: on every rank, when the reloaded model is not the one in training.
            ScoresDiffer: on every rank, when it has the same head and scores differently.
        """
        self.meter.pause()
        self.watchdog.beat("saving the model")
        folder = Path(output_dir or self.args.output_dir)
        has_eval = self.eval_dataset is not None and len(self.eval_dataset)
        groups = self.eval_dataset if has_eval else self.train_dataset
        contract = with_golden_scores(self.contract, self.model_wrapped, groups, self.args.device)
        self._head_to_save = head_weight(self.model)
        # Errors are agreed on after the collectives in here, or the ranks without one would wait for the others.
        with agreed_errors(), disk_errors_explained(folder):
            super().save_model(str(folder), _internal_call=_internal_call)
            if self.args.should_save:
                contract.save(folder)
                verify_saved(
                    folder,
                    contract,
                    self._head_to_save,
                    self.args.device,
                    parameter_bytes(self.model),
                    packed_backend(self.model),
                )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the weights, with the head in fp32 and without the pickle that transformers adds."""
        if state_dict:
            heads = [name for name in state_dict if name in head_parameter_names(self.model)]
            assert heads, "the weights to be saved hold no reward head"
            for name in heads:
                state_dict[name] = self._head_to_save.clone()
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)
            name_exact_type(folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint (see `CheckpointWriter.save`). A collective."""
        self.step_times.write_last_step()
        seconds = self.checkpoints.save(is_stopping=bool(self.stopping.reason))
        self.stopping.note_save(seconds)
        self.write_waiting_records()

    def write_waiting_records(self, is_end: bool = False) -> None:
        """Write the lines of metrics, timings and other records that a full disk has refused so far.

        Args:
            is_end: no later call follows; what still can't be written is said to be lost.
        """
        for record in write_waiting([*self.callback_handler.callbacks, self.nonfinite]):
            if is_end:
                logger.warning(f"{record.path}: the run ends, and {record.num_waiting:,} lines of it are lost")

    def create_model_card(self, *unused: Any, **also_unused: Any) -> None:
        """Do nothing: the model card is written once, at the end, with the evaluation's numbers."""

    # --- Resuming ------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load weights only where they don't come with the optimizer's state, in full precision."""
        if not holds_portable_state(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Make the engine, then load our own state; the engine's own loader would look for its files."""
        if resume_from_checkpoint is None or not holds_portable_state(Path(resume_from_checkpoint)):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_training_state(self, Path(resume_from_checkpoint))
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, but no step beyond the last.

        transformers looks at `max_steps` only after a step, and a run may resume at its last one.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


@contextlib.contextmanager
def _trained_weights_kept(model: torch.nn.Module) -> Iterator[None]:
    """Undo what TRL does to the trained weights of 4-bit models: it rounds them to bfloat16.

    Where that is wanted, the engine does it, and keeps a master in fp32.
    """
    is_quantised = getattr(model, "is_loaded_in_4bit", False)
    trained = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad] if is_quantised else []
    yield
    for parameter, value in trained:
        parameter.data = value
